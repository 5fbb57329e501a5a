"""One trajectory folder of the release: traj_000012/ with each camera's RGB and mask streams and metadata.h5.

Frame t, joints t and poses t are recorded before action t, and action t sets target_qpos[t], as the episode contract
requires. The streams' headers, and index.json with its junk keys and stale lists, are not used.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32

from data import hdf5
from data.recordings import Recording
from data.schema import Episode, EpisodeError
from data.video import find_stream, frames_array, masks_array, read_stream

METADATA = "metadata.h5"
MAX_MISSING = 1  # frames that a stream may lack at its end, compared with the arrays


def dataset_folders(source: Path) -> list[Path]:
    """Every folder under source (itself included) that contains trajectories; EpisodeError if there is none."""
    folders = []
    for folder, children, _ in os.walk(source):
        if any(name.startswith("traj_") for name in children):
            folders.append(Path(folder))
        children[:] = sorted(name for name in children if not name.startswith(("traj_", ".")))
    if not folders:
        raise EpisodeError(f"{source}: expected folders traj_000000, traj_000001, ... below it, found none; correct it")
    return sorted(folders)


def recordings_of(folder: Path, split: str) -> list[Recording]:
    """The trajectories of a dataset folder by id; EpisodeError for an id that is not a number or occurs twice."""
    by_id: dict[int, Recording] = {}
    for path in sorted(folder.glob("traj_*")):
        number = re.fullmatch(r"traj_(\d+)", path.name)
        if not path.is_dir():
            continue
        if number is None:
            raise EpisodeError(
                f"{path}: expected a folder traj_ID with a number, found {path.name}; rename or remove it"
            )
        if (index := int(number[1])) in by_id:
            raise EpisodeError(f"{path}: expected one trajectory {index}, found {by_id[index].name} too; remove one")
        by_id[index] = Recording(split, index, str(path), tuple(sorted(path.iterdir())))
    return [by_id[index] for index in sorted(by_id)]


@dataclass(frozen=True)
class Header:
    """A trajectory's contents, read without its frames: widths, and how many objects have poses (0: none)."""

    masks: bool
    target_dim: int
    state_dim: int | None
    objects: int


def read_header(folder: Path, camera: str) -> Header | None:
    """The header of a trajectory; None if it is damaged (reading it will say how)."""
    try:
        with hdf5.open_file(folder / METADATA) as file:
            targets, state = hdf5.dataset(file, "target_qpos"), hdf5.dataset(file, "qpos")
            effector, objects = hdf5.dataset(file, "eef_pose"), hdf5.dataset(file, "object_poses")
            if targets is None:
                return None
            return Header(
                masks=find_stream(folder, f"{camera}_foreground_mask") is not None,
                target_dim=targets.shape[-1],
                state_dim=None if state is None else state.shape[-1],
                objects=objects.shape[1] if objects is not None and effector is not None and objects.ndim == 3 else 0,
            )
    except (EpisodeError, IndexError):
        return None


@dataclass(frozen=True)
class TrajectoryReader:
    """How the trajectories of one dataset are read.

    `actions` turns target rows [t,a] into action rows; `num_objects` None leaves positions out; trajectories with fewer
    objects are padded with ones that never move and so never count as interacting.
    """

    camera: str
    image_size: int
    robot_id: int
    control_hz: float
    masks: bool
    state: bool
    num_objects: int | None
    actions: Callable[[Float32[np.ndarray, "t a"]], Float32[np.ndarray, "t j"]] = field(repr=False)

    def read(self, recording: Recording, folder: Path, success: bool) -> tuple[Episode, str]:
        """The episode in a trajectory folder; `success` is used if the file has no such attribute."""
        frames = frames_array(read_stream(self._stream(folder, "rgb")), self.image_size, antialias=False)
        masks = self._read_masks(folder)
        with hdf5.open_file(folder / METADATA) as file:
            targets = _rows(file, "target_qpos")
            state = _rows(file, "qpos") if self.state else None
            effector, objects = self._positions(file, len(targets))
            recorded, text = hdf5.flag(file, "success"), hdf5.text(file, "task_description")
        try:
            actions = self.actions(targets)
        except ValueError as error:
            raise EpisodeError(
                f"{folder / METADATA}: target_qpos: expected {error}; export the episode again"
            ) from error
        rows = {"rgb": frames, "foreground_mask": masks, "target_qpos": targets, "qpos": state}
        length, note = _common_length(folder, {key: len(value) for key, value in rows.items() if value is not None})
        episode = Episode(
            frames=frames[:length],
            actions=actions[:length],
            state=None if state is None else state[:length],
            success=success if recorded is None else recorded,
            text=text,
            episode_id=recording.episode_id,
            robot_id=self.robot_id,
            control_hz=self.control_hz,
            foreground_mask=None if masks is None else masks[:length],
            effector_position=None if effector is None else effector[:length],
            object_positions=None if objects is None else objects[:length],
        )
        return episode, note

    def _stream(self, folder: Path, kind: str) -> Path:
        name = f"{self.camera}_{kind}"
        path = find_stream(folder, name)
        if path is None:
            cameras = sorted({p.name.partition("_rgb")[0] for p in folder.iterdir() if "_rgb" in p.name})
            available = ", ".join(cameras) or "none"
            raise EpisodeError(
                f"{folder}: {name}: expected a video or image folder, found cameras {available}; see --camera"
            )
        return path

    def _read_masks(self, folder: Path) -> np.ndarray | None:
        if not self.masks:
            return None
        path = self._stream(folder, "foreground_mask")
        masks = masks_array(read_stream(path), self.image_size)
        if len(masks) and not masks.any():
            raise EpisodeError(f"{path}: expected foreground (above 127 of 255), found none; were 0 and 1 saved?")
        return masks

    def _positions(self, file: h5py.File, length: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Effector [t,3] and objects [t,o,3]; at rest at the origin where the file has none (no known interaction)."""
        if self.num_objects is None:
            return None, None
        effector, poses = hdf5.numbers(file, "eef_pose"), hdf5.numbers(file, "object_poses")
        objects = np.zeros((length, self.num_objects, 3), np.float32)
        if effector is None or poses is None:
            return np.zeros((length, 3), np.float32), objects
        if effector.shape != (length, 7) or poses.ndim != 3 or poses.shape[0] != length or poses.shape[2] != 7:
            shapes = f"{effector.shape} and {poses.shape}"
            where = f"{file.filename}: eef_pose, object_poses"
            raise EpisodeError(f"{where}: expected [{length},7] and [{length},o,7], found {shapes}; export it again")
        objects[:, : poses.shape[1]] = poses[..., :3]
        return np.ascontiguousarray(effector[:, :3]), objects


def _rows(file: h5py.File, key: str) -> np.ndarray:
    """An array [t,a] or [t,1,a] (the release's robot axis) as [t,a]."""
    array = hdf5.numbers(file, key)
    if array is None:
        raise EpisodeError(f"{file.filename}: {key}: expected an array, found none; export the episode again")
    if array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 2:
        raise EpisodeError(f"{file.filename}: {key}: expected [t,a] or [t,1,a], found {array.shape}; export it again")
    return array


def _common_length(folder: Path, lengths: dict[str, int]) -> tuple[int, str]:
    """The rows common to all: one missing last frame is allowed as it shifts nothing; more could mean anything."""
    shortest, longest = min(lengths.values()), max(lengths.values())
    counts = ", ".join(f"{count} of {key}" for key, count in lengths.items())
    if longest - shortest > MAX_MISSING:
        raise EpisodeError(f"{folder}: expected as many frames as rows, found {counts}; export the episode again")
    return shortest, "" if shortest == longest else f"{folder}: cut to {shortest} frames, found {counts}"
