"""Real simulators by name, behind one small protocol (protocol.py)."""

from rlawm_jax.sim.protocol import Simulator

SIMULATORS = ("pusht", "panda_touch", "panda_push", "panda_mark")


def make(name: str, image_size: int) -> Simulator:
    """A world of the simulator `name` with frames of `image_size` pixels."""
    if name not in SIMULATORS:
        raise ValueError(f"simulator: expected one of {', '.join(SIMULATORS)}, found {name!r}")
    family, _, task = name.partition("_")
    try:
        if family == "panda":
            from rlawm_jax.sim.panda import PandaSimulator

            return PandaSimulator(image_size, task)
        from rlawm_jax.sim.pusht import PushTSimulator

        return PushTSimulator(image_size)
    except ModuleNotFoundError as error:
        from data.simulated import missing

        raise ValueError(f"simulator {name}: {missing(family, error)}") from error
