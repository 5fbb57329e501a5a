"""The release's interactive-world-simulator (IWS) data: one dataset per task, with one split `episodes`.

    SOURCE/pusht/traj_000000/camera_0_rgb.mp4, camera_0_foreground_mask.mp4, metadata.h5  ->  iws/pusht_512px:episodes

SOURCE is the folder of all tasks or of one. Trajectories are laid out as in the release's ManiSkill data; actions are
the 2-D target rows, unchanged. Frames are squashed to a square (640 x 480 in the release). Ids 0 to 9 are validation.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data.maniskill.trajectory import TrajectoryReader, dataset_folders, read_header, recordings_of
from data.names import word
from data.recordings import Layout, Recording, RecordingsBuilder, common
from data.release import IWS_SPLIT
from data.schema import Episode, EpisodeError, Spec

CAMERA = "camera_0"
CONTROL_HZ = 30.0  # from the videos' headers; nothing better is recorded


def as_recorded(targets: np.ndarray) -> np.ndarray:
    """Target rows are the actions."""
    return targets


@dataclass(frozen=True)
class IWSLayout(Layout):
    """The trajectories of one task."""

    name: str
    folder: Path
    reader: TrajectoryReader
    spec: Spec
    metadata: dict[str, Any] = field(repr=False)

    def recordings(self) -> list[Recording]:
        """The task's trajectories."""
        return recordings_of(self.folder, IWS_SPLIT)

    def read(self, recording: Recording) -> tuple[Episode, str]:
        """One trajectory."""
        return self.reader.read(recording, Path(recording.name), success=False)


def layouts(source: Path, image_size: int, camera: str | None = None) -> list[IWSLayout]:
    """One layout per task in the tree."""
    tasks = [_layout(folder, image_size, camera or CAMERA) for folder in dataset_folders(source)]
    if len({layout.name for layout in tasks}) < len(tasks):
        names = ", ".join(str(layout.folder) for layout in tasks)
        raise EpisodeError(f"{source}: expected tasks of different names, found {names}; name one of them")
    return tasks


def _layout(folder: Path, image_size: int, camera: str) -> IWSLayout:
    paths = [Path(recording.name) for recording in recordings_of(folder, IWS_SPLIT)]
    headers = [header for path in paths if (header := read_header(path, camera))]
    if not headers:
        raise EpisodeError(f"{folder}: expected metadata.h5 with target_qpos in a trajectory, found none; see data/iws")
    masks = bool(common(header.masks for header in headers))
    state_dim = common(header.state_dim for header in headers)
    spec = Spec(
        image_size=(image_size, image_size),
        action_dim=common(header.target_dim for header in headers),
        state_dim=state_dim,
        foreground_mask=masks,
    )
    reader = TrajectoryReader(
        camera=camera,
        image_size=image_size,
        robot_id=0,
        control_hz=CONTROL_HZ,
        masks=masks,
        state=state_dim is not None,
        num_objects=None,
        actions=as_recorded,
    )
    name = word(folder.resolve().name)
    metadata = {"actions": "target rows as recorded, raw", "control_hz": CONTROL_HZ, "camera": camera, "task": name}
    return IWSLayout(name, folder, reader, spec, metadata)


class IWSBuilder(RecordingsBuilder):
    """One task of the release's IWS data; actions are the recorded target rows."""

    name = "iws"
    VERSION = tfds.core.Version("1.0.0")
