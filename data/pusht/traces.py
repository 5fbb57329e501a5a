"""Committed Push-T traces (data/traces.py): actions uint16 in 1/64 pixel, states [5] of data/pusht/sim.py.

A replay must reproduce final_block [3] (pixels, radians) and coverage.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data import traces
from data.pusht.sim import PushT, versions

FOLDER = Path(__file__).parent / "traces"
POSE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(traces.Trace):
    """One recorded episode, with where the block must end and how much of the goal it must cover."""

    final_block: Float[np.ndarray, "3"]
    coverage: float

    def deviation(self, world: PushT) -> tuple[str, str] | None:
        """The block's final pose and the world's, unless pose and coverage agree."""
        close = np.abs(world.block - self.final_block).max() <= POSE_TOLERANCE
        if close and abs(world.coverage() - self.coverage) <= POSE_TOLERANCE:
            return None
        return f"the block to end at {self.final_block.round(3).tolist()}", f"{world.block.round(3).tolist()}"


FILES = traces.TraceFiles(Trace, versions, FOLDER, np.uint16, scale=64.0, low=0.0, high=512.0)
quantise, save, load, replay = FILES.quantise, FILES.save, FILES.load, FILES.replay
