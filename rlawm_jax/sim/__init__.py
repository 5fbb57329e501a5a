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


def for_dataset(reference: str) -> str | None:
    """The simulator that a dataset "name:split" was recorded in, by their names; None if it is none of ours.

    A split that is no task (panda:play) gets the first simulator of its family: they differ in their scores only.
    """
    name, _, split = reference.partition(":")
    family = name.partition("/")[0]
    own = [simulator for simulator in SIMULATORS if simulator.partition("_")[0] == family]
    return next((simulator for simulator in own if simulator == f"{family}_{split}"), own[0] if own else None)
