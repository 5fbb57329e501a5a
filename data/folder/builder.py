"""Your own recordings as a dataset: one sub-folder per episode, in the order of their names.

    SOURCE/any_name/video.mp4          or SOURCE/any_name/frames/*.png|jpg, in the order of their names
    SOURCE/any_name/episode.npz        actions [T,A], and any other field of `data.schema.Episode` except frames and id

Episodes are numbered from 0 in the order of the sub-folders' names; the first ten are validation. Frames are squashed
to a square (as in the authors' release, no letterboxing). `control_hz` defaults to the video's frame rate. Read the
result as `folder/CONFIG:episodes`.
"""

import dataclasses
import difflib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from data.recordings import Layout, Recording, RecordingsBuilder
from data.schema import Episode, EpisodeError, Spec, validate
from data.video import frames_array, nearest, read_stream, video_rate

SPLIT = "episodes"
FLOAT_FIELDS = ("actions", "state", "effector_position", "object_positions")
DEFAULTS = {"state": None, "success": False, "text": "", "robot_id": 0}
FIELDS = sorted({field.name for field in dataclasses.fields(Episode)} - {"frames", "episode_id"})


def _read_arrays(folder: Path) -> dict[str, Any]:
    """The fields in episode.npz, as `Episode` expects them."""
    path = folder / "episode.npz"
    if not path.exists():
        raise EpisodeError(f"{folder}: episode.npz: expected a file with actions, found none; save one with np.savez")
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EpisodeError(f"{path}: expected an npz file of plain arrays, found {error}; save it again") from error
    for key in arrays:
        if key not in FIELDS:
            nearest = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)[0]
            raise EpisodeError(f"{path}: {key}: expected one of {', '.join(FIELDS)}; did you mean {nearest}?")
    if "actions" not in arrays:
        raise EpisodeError(f"{path}: actions: expected an array [T,A], found none; save one row per frame")
    scalars = {key: value.item() if value.ndim == 0 else value for key, value in arrays.items()}
    numbers = {key for key in FLOAT_FIELDS if key in arrays and np.issubdtype(arrays[key].dtype, np.number)}
    return DEFAULTS | scalars | {key: arrays[key].astype(np.float32) for key in numbers}


def _read_images(folder: Path, size: int) -> tuple[UInt8[np.ndarray, "t n n 3"], float | None]:
    """All frames, and the frame rate if there is one."""
    video, images = folder / "video.mp4", folder / "frames"
    if video.exists() == images.is_dir():
        present = "both" if video.exists() else "neither"
        raise EpisodeError(
            f"{folder}: frames: expected video.mp4 or a folder frames, found {present}; keep one of them"
        )
    rate = video_rate(video) if video.exists() else None
    return frames_array(read_stream(video if video.exists() else images), size), rate


def read_episode(folder: Path, episode_id: int, image_size: int) -> Episode:
    """One recorded sub-folder; raises EpisodeError naming the file and field that cannot be read."""
    fields = _read_arrays(folder)
    frames, rate = _read_images(folder, image_size)
    if fields.setdefault("control_hz", rate) is None:
        raise EpisodeError(f"{folder}: control_hz: expected the action rate in Hz, found none; add it to episode.npz")
    mask = fields.get("foreground_mask")
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.dtype == np.bool_ and mask.size:
        fields["foreground_mask"] = np.stack([nearest(frame, image_size) for frame in mask])
    return Episode(frames=frames, episode_id=episode_id, **fields)


@dataclasses.dataclass(frozen=True)
class FolderLayout(Layout):
    """A folder of recordings; its first episode sets the fields that all must have."""

    source: Path
    spec: Spec
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The source folder's name."""
        return self.source.resolve().name

    def recordings(self) -> list[Recording]:
        """The sub-folders in the order of their names."""
        return [
            Recording(SPLIT, index, str(folder), tuple(sorted(folder.iterdir())))
            for index, folder in enumerate(_episode_folders(self.source))
        ]

    def read(self, recording: Recording) -> tuple[Episode, str]:
        """One sub-folder."""
        return read_episode(Path(recording.name), recording.episode_id, self.spec.image_size[0]), ""


def layouts(source: Path, image_size: int) -> list[FolderLayout]:
    """The layout of a source folder."""
    folder = _episode_folders(source)[0]
    first = read_episode(folder, 0, image_size)
    validate(first, str(folder))
    return [FolderLayout(source, Spec.of(first))]


def _episode_folders(source: Path) -> list[Path]:
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if not folders:
        raise EpisodeError(f"{source}: expected one sub-folder per episode, found none; see data/schema.py")
    return folders


class FolderBuilder(RecordingsBuilder):
    """Your own recordings, with one split `episodes`."""

    name = "folder"
    VERSION = tfds.core.Version("1.0.0")
