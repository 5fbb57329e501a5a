"""The Push-T dataset: committed traces replayed in gym-pusht and rendered at the requested size.

Splits: `play` (pushes from all sides, without a goal) and `demo` (a planner solves the task). Built by
`python -m data.build pusht`; reading it needs no simulator.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data.pusht import motion, traces
from data.pusht.sim import AGENT_RADIUS, CONTROL_HZ, WORLD, PushT
from data.schema import Episode, Spec, features, to_example

TEXTS = {"play": "play with the block", "demo": "push the block onto the green goal"}
SUCCESS_COVERAGE = 0.9
# positions are in workspace widths, and the frame shows the workspace; from the T's centre to its end it is 77 px
PROJECTION = {
    "matrix": np.eye(3).tolist(),
    "effector_radius": round(AGENT_RADIUS / WORLD, 3),
    "object_radius": round(77 / WORLD, 3),
}


@dataclasses.dataclass(eq=False)
class PushTConfig(tfds.core.BuilderConfig):
    """Image side in pixels, and how many episodes of each split to build (`None` for all)."""

    image_size: int = 112
    limit: int | None = None

    @classmethod
    def of(cls, image_size: int, limit: int | None = None) -> "PushTConfig":
        """The config, named after its settings so that builds of different sizes live side by side."""
        name = f"{image_size}px" if limit is None else f"{image_size}px_first{limit}"
        return cls(name=name, image_size=image_size, limit=limit)


class PushTBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the Push-T episodes; state [5] is agent x, y and block x, y (pixels), block angle (radians)."""

    name = "pusht"
    VERSION = tfds.core.Version("1.0.0")

    @property
    def spec(self) -> Spec:
        """What all Push-T episodes have in common."""
        size = self.builder_config.image_size
        return Spec(image_size=(size, size), action_dim=2, state_dim=5, position_dim=2, num_objects=1)

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = tfds.core.MetadataDict(
            length_unit="workspace widths (512 simulator pixels)",
            object_positions="centre of gravity of the block",
            actions="target position of the agent in simulator pixels, 0 to 512",
            control_hz=CONTROL_HZ,
            image_size=self.builder_config.image_size,
            projection=PROJECTION,
            hold_still="state",
            success=f"final coverage of the goal >= {SUCCESS_COVERAGE}",
        )
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=features(self.spec), metadata=metadata, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {s: self._generate_examples(s) for s in TEXTS if (traces.FOLDER / f"{s}.npz").exists()}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        recorded, recorded_with = traces.load(traces.FOLDER / f"{split}.npz")
        sim = PushT(self.builder_config.image_size)
        for index, trace in enumerate(recorded[: self.builder_config.limit]):
            name = f"pusht {split} episode {index}"
            yield index, to_example(episode(trace, sim, split, index, recorded_with), name, self.spec)


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
