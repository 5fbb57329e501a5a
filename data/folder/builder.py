"""Your own recordings as a dataset: one sub-folder per episode, in the order of their names.

    SOURCE/any_name/video.mp4          or SOURCE/any_name/frames/*.png|jpg, in the order of their names
    SOURCE/any_name/episode.npz        actions [T,A], and any other field of `data.schema.Episode` but frames and id

Episodes are numbered from 0 in the order of the sub-folders' names; the first ten are validation. Frames are squashed
to a square (as in the authors' release, without letterbox). `control_hz` defaults to the video's frame rate. Read the
result as `folder/CONFIG:episodes`.
"""

import dataclasses
import difflib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, UInt8
from PIL import Image

from data.schema import Episode, EpisodeError, Spec, features, to_example, validate

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
FLOAT_FIELDS = ("actions", "state", "effector_position", "object_positions")
DEFAULTS = {"state": None, "success": False, "text": "", "robot_id": 0}
FIELDS = sorted({field.name for field in dataclasses.fields(Episode)} - {"frames", "episode_id"})


def _read_arrays(folder: Path) -> dict[str, Any]:
    """The fields in episode.npz, as `Episode` wants them."""
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


def _read_images(folder: Path) -> tuple[list[Image.Image], float | None]:
    """All frames, and the frame rate if there is one."""
    video, images = folder / "video.mp4", folder / "frames"
    if video.exists() == images.is_dir():
        found = "both" if video.exists() else "neither"
        raise EpisodeError(f"{folder}: frames: expected video.mp4 or a folder frames, found {found}; keep one of them")
    if video.exists():
        try:
            with av.open(str(video)) as container:
                rate = container.streams.video[0].average_rate
                return [frame.to_image() for frame in container.decode(video=0)], float(rate) if rate else None
        except (av.error.FFmpegError, IndexError) as error:
            raise EpisodeError(f"{video}: expected a readable video, found {error}; export it again") from error
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    try:
        return [Image.open(path).convert("RGB") for path in paths], None
    except OSError as error:
        raise EpisodeError(f"{folder}: frames: expected readable images, found {error}; export it again") from error


def _resize_masks(masks: Any, size: int) -> Bool[np.ndarray, "t n n"]:
    """Masks squashed like the frames, nearest neighbour, so that they stay masks."""
    return np.stack(
        [np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)) for mask in masks]
    )


def _squash(images: list[Image.Image], size: int) -> UInt8[np.ndarray, "t n n 3"]:
    if not images:
        return np.zeros((0, size, size, 3), np.uint8)
    return np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images])


def read_episode(folder: Path, episode_id: int, image_size: int) -> Episode:
    """One recorded sub-folder; raises EpisodeError naming the file and field that cannot be read."""
    fields = _read_arrays(folder)
    images, rate = _read_images(folder)
    if fields.setdefault("control_hz", rate) is None:
        raise EpisodeError(f"{folder}: control_hz: expected the action rate in Hz, found none; add it to episode.npz")
    mask = fields.get("foreground_mask")
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.dtype == np.bool_ and mask.size:
        fields["foreground_mask"] = _resize_masks(mask, image_size)
    return Episode(frames=_squash(images, image_size), episode_id=episode_id, **fields)


@dataclasses.dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """Where the recordings are, the image side in pixels, how many episodes to take, and what they have in common."""

    source: Path = Path()
    image_size: int = 112
    limit: int | None = None
    spec: Spec | None = None

    @classmethod
    def of(cls, source: Path, image_size: int, limit: int | None = None) -> "FolderConfig":
        """The config of a source folder, named after it; its first episode says what all must have."""
        folders = _episode_folders(source)
        first = read_episode(folders[0], 0, image_size)
        validate(first, str(folders[0]))
        name = f"{source.resolve().name}_{image_size}px" + ("" if limit is None else f"_first{limit}")
        return cls(name=name, source=source, image_size=image_size, limit=limit, spec=Spec.of(first))


def _episode_folders(source: Path) -> list[Path]:
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if not folders:
        raise EpisodeError(f"{source}: expected one sub-folder per episode, found none; see data/schema.py")
    return folders


class FolderBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a folder of recordings, with one split `episodes`."""

    name = "folder"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        spec = features(self.builder_config.spec)
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=spec, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"episodes": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for index, folder in enumerate(_episode_folders(config.source)[: config.limit]):
            yield index, to_example(read_episode(folder, index, config.image_size), str(folder), config.spec)
