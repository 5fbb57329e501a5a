"""Real simulators by name, behind one small protocol (protocol.py)."""

from rlawm_jax.sim.protocol import Simulator

SIMULATORS = ("pusht",)


def make(name: str, image_size: int) -> Simulator:
    """A world of the simulator `name` with frames of `image_size` pixels."""
    if name not in SIMULATORS:
        raise ValueError(f"simulator: expected one of {', '.join(SIMULATORS)}, found {name!r}")
    try:
        from rlawm_jax.sim.pusht import PushTSimulator
    except ModuleNotFoundError as error:
        raise ValueError(
            f"simulator {name}: expected the package {error.name}, found none; "
            "pip install -r launch/requirements-demo.txt"
        ) from error
    return PushTSimulator(image_size)
