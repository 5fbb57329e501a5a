"""The arm's dataset: committed traces replayed in PyBullet and rendered at the requested size.

Splits: `play` (pushes from all sides, without a goal) and one of demonstrations per task (data/panda/tasks.py). Built
by `python -m data.build panda`; reading it needs no simulator.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data.description import from_clip
from data.panda import traces
from data.panda.sim import CONTROL_HZ, World, camera_matrix
from data.panda.tasks import TASKS
from data.schema import Episode
from data.simulated import SimulatedBuilder

TEXTS = {"play": "play with the cube"} | {name: task.text for name, task in TASKS.items()}

# in frame widths: the hand above the fingertips, and the cube with its corners
RADII = {"effector_radius": 0.12, "object_radius": 0.09}


def episode(trace: traces.Trace, world: World, split: str, index: int, recorded_with: dict[str, str]) -> Episode:
    """Replay a trace into an episode; raises EpisodeError if the simulator does not reproduce it."""
    frames, state = traces.replay(trace, world, f"panda {split} episode {index}", recorded_with)
    return Episode(
        frames=frames,
        actions=trace.actions,
        state=state,
        success=bool(trace.success),
        text=TEXTS[split],
        episode_id=index,
        robot_id=0,
        control_hz=CONTROL_HZ,
        effector_position=state[:, :3],
        object_positions=np.ascontiguousarray(state[:, None, 3:6]),
    )


class PandaBuilder(SimulatedBuilder):
    """TFDS builder of the arm's episodes; state [9] is as in data/panda/sim.py, in metres and radians."""

    name = "panda"
    VERSION = tfds.core.Version("1.0.0")

    texts, files = TEXTS, traces.FILES
    world, episode = World, staticmethod(episode)
    sizes: ClassVar = {"action_dim": 3, "state_dim": 9, "position_dim": 3, "num_objects": 1}
    metadata: ClassVar = {
        "length_unit": "metres",
        "object_positions": "centre of the cube",
        "actions": "displacement of the gripper x, y, z in units of 5 cm, each in [-1, 1]",
        "control_hz": CONTROL_HZ,
        "projection": {"matrix": from_clip(camera_matrix()).tolist(), **RADII},
        "hold_still": "zeros",
        "success": "; ".join(f"{name}: {task.text}, within {task.success_within} m" for name, task in TASKS.items()),
    }
