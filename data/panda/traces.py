"""Committed traces of the arm (data/traces.py): actions int8 in hundredths, states [9] of data/panda/sim.py.

A replay must reproduce end [9], the last state; success says whether the task was solved.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data import traces
from data.panda.sim import World, versions

FOLDER = Path(__file__).parent / "traces"
TOLERANCE = 1e-4  # metres and radians; a replay with the same packages is exact


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(traces.Trace):
    """One recorded episode, with the state that it must end in, and whether it solves the task of its split."""

    end: Float[np.ndarray, "9"]
    success: bool

    def deviation(self, world: World) -> tuple[str, str] | None:
        """The final state and the world's, unless they agree."""
        if np.abs(world.state - self.end).max() <= TOLERANCE:
            return None
        return f"the world to end in {self.end.round(4).tolist()}", f"{world.state.round(4).tolist()}"


FILES = traces.TraceFiles(Trace, versions, FOLDER, np.int8, scale=100.0, low=-1.0, high=1.0)
quantise, save, load, replay = FILES.quantise, FILES.save, FILES.load, FILES.replay
