"""The Push-T dataset: committed traces replayed in gym-pusht and rendered at the requested size.

Splits: `play` (pushes from all sides, without a goal) and `demo` (a planner solves the task). Built by
`python -m data.build pusht`; reading it needs no simulator.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data.pusht import motion, traces
from data.pusht.sim import AGENT_RADIUS, CONTROL_HZ, WORLD, PushT
from data.schema import Episode
from data.simulated import SimulatedBuilder

TEXTS = {"play": "play with the block", "demo": "push the block onto the green goal"}
SUCCESS_COVERAGE = 0.9
# positions are in workspace widths, and the frame shows the workspace; from the T's centre to its end it is 77 px
PROJECTION = {
    "matrix": np.eye(3).tolist(),
    "effector_radius": round(AGENT_RADIUS / WORLD, 3),
    "object_radius": round(77 / WORLD, 3),
}


def episode(trace: traces.Trace, sim: PushT, split: str, index: int, recorded_with: dict[str, str]) -> Episode:
    """Replay a trace into an episode; raises EpisodeError if the simulator does not reproduce it."""
    frames, state = traces.replay(trace, sim, f"pusht {split} episode {index}", recorded_with)
    centres = np.stack([motion.centre(row[2:]) for row in state])
    return Episode(
        frames=frames,
        actions=trace.actions,
        state=state,
        success=trace.coverage >= SUCCESS_COVERAGE,
        text=TEXTS[split],
        episode_id=index,
        robot_id=0,
        control_hz=CONTROL_HZ,
        effector_position=(state[:, :2] / WORLD).astype(np.float32),
        object_positions=(centres[:, None] / WORLD).astype(np.float32),
    )


class PushTBuilder(SimulatedBuilder):
    """TFDS builder of the Push-T episodes; state [5] is agent x, y and block x, y (pixels), block angle (radians)."""

    name = "pusht"
    VERSION = tfds.core.Version("1.0.0")

    texts, files = TEXTS, traces.FILES
    world, episode = PushT, staticmethod(episode)
    sizes: ClassVar = {"action_dim": 2, "state_dim": 5, "position_dim": 2, "num_objects": 1}
    metadata: ClassVar = {
        "length_unit": "workspace widths (512 simulator pixels)",
        "object_positions": "centre of gravity of the block",
        "actions": "target position of the agent in simulator pixels, 0 to 512",
        "control_hz": CONTROL_HZ,
        "projection": PROJECTION,
        "hold_still": "state",
        "success": f"final coverage of the goal >= {SUCCESS_COVERAGE}",
    }
