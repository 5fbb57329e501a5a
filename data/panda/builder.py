"""The arm's dataset: committed traces replayed in PyBullet and rendered at the requested size.

Splits: `play` (pushes from all sides, without a goal) and one of demonstrations per task (data/panda/tasks.py). Built
by `python -m data.build panda`; reading it needs no simulator.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data.description import from_clip
from data.panda import traces
from data.panda.sim import CONTROL_HZ, World, camera_matrix
from data.panda.tasks import TASKS
from data.schema import Episode, EpisodeError, Spec, features, to_example

TEXTS = {"play": "play with the cube"} | {name: task.text for name, task in TASKS.items()}

# in frame widths: the hand above the fingertips, and the cube with its corners
RADII = {"effector_radius": 0.12, "object_radius": 0.09}


@dataclasses.dataclass(eq=False)
class PandaConfig(tfds.core.BuilderConfig):
    """Image side in pixels, which splits and how many episodes of each (`None` for all), and by how many processes."""

    image_size: int = 112
    splits: tuple[str, ...] = tuple(TEXTS)
    limit: int | None = None
    workers: int = 1

    @classmethod
    def of(cls, image_size: int, *, splits: str | None = None, limit: int | None = None, workers: int = 1):
        """The config, named after what it builds so that different builds live side by side; `splits` is "a,b".

        Raises EpisodeError for an unknown split.
        """
        chosen = tuple(TEXTS) if splits is None else tuple(splits.split(","))
        if unknown := [split for split in chosen if split not in TEXTS]:
            raise EpisodeError(f"--only: expected splits among {', '.join(TEXTS)}, found {', '.join(unknown)}")
        parts = [f"{image_size}px", *(chosen if splits else ()), *([f"first{limit}"] if limit else ())]
        return cls(name="_".join(parts), image_size=image_size, splits=chosen, limit=limit, workers=workers)


class PandaBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the arm's episodes; state [9] is as in data/panda/sim.py, in metres and radians."""

    name = "panda"
    VERSION = tfds.core.Version("1.0.0")

    @property
    def spec(self) -> Spec:
        """What all episodes have in common."""
        size = self.builder_config.image_size
        return Spec(image_size=(size, size), action_dim=3, state_dim=9, position_dim=3, num_objects=1)

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = tfds.core.MetadataDict(
            length_unit="metres",
            object_positions="centre of the cube",
            actions="displacement of the gripper x, y, z in units of 5 cm, each in [-1, 1]",
            control_hz=CONTROL_HZ,
            image_size=self.builder_config.image_size,
            projection={"matrix": from_clip(camera_matrix()).tolist(), **RADII},
            hold_still="zeros",
            success="; ".join(f"{name}: {task.text}, within {task.success_within} m" for name, task in TASKS.items()),
        )
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=features(self.spec), metadata=metadata, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.builder_config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        recorded, recorded_with = traces.load(traces.FOLDER / f"{split}.npz")
        jobs = [(trace, split, i, recorded_with) for i, trace in enumerate(recorded[: config.limit])]
        # spawned: a forked process would share the parent's threads
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(config.workers, len(jobs))) as pool:
            done = pool.imap(functools.partial(_render, image_size=config.image_size), jobs)
            for (_, _, i, _), rendered in zip(jobs, tqdm(done, split, len(jobs), unit="episode"), strict=True):
                yield i, to_example(rendered, f"panda {split} episode {i}", self.spec)


@functools.cache
def _world(image_size: int) -> World:
    """This process's only world."""
    return World(image_size)


def _render(job: tuple[traces.Trace, str, int, dict[str, str]], image_size: int) -> Episode:
    return episode(job[0], _world(image_size), *job[1:])


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
