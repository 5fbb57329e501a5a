"""Frames and masks of a recording, from a video (PyAV) or a folder of images, in order and one at a time.

Frames are located by count, never by time, except by `clip`, which reads a segment of a longer video: rates in file
headers are often wrong (the release's say 30 fps for 20 Hz).
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import av.container
import av.error
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data.schema import EpisodeError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")  # tried in this order
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_THRESHOLD = 127  # of 255: masks come as lossy video
Box = tuple[float, float, float, float]


def find_stream(folder: Path, name: str) -> Path | None:
    """The image folder folder/name, else the video folder/name.mp4|avi|mov|mkv|webm, else None."""
    candidates = [folder / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES]
    if (folder / name).is_dir():
        return folder / name
    return next((path for path in candidates if path.is_file()), None)


def read_stream(path: Path) -> Iterator[Image.Image]:
    """The frames of a video or of an image folder, in order, as stored (RGB from videos).

    Raises EpisodeError naming the file: unreadable, or a gap in the numbers of an image folder.
    """
    return read_images(path) if path.is_dir() else (frame.to_image() for frame in _decode(path))


def read_images(folder: Path) -> Iterator[Image.Image]:
    """The images of a folder in the natural order of their names (2 before 10)."""
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=natural_key)
    _check_numbers(folder, paths)
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                yield image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise EpisodeError(f"{path}: expected a readable image, found {error}; export it again") from error


def natural_key(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key that compares runs of digits by value."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path.name)
    ]


def _check_numbers(folder: Path, paths: list[Path]) -> None:
    """Numbered images must be consecutive: a missing one would shift all that follow against the actions."""
    ends = [re.search(r"(\d+)$", path.stem) for path in paths]
    numbers = [int(end[1]) for end in ends if end]
    if len(numbers) != len(paths):
        return
    for before, after in itertools.pairwise(numbers):
        if after != before + 1:
            raise EpisodeError(f"{folder}: expected image {before + 1} after {before}, found {after}; export it again")


def clip(path: Path, start: float, count: int, rate: float) -> Iterator[Image.Image]:
    """`count` consecutive frames of a video from `start` seconds on, at `rate` frames per second.

    Raises EpisodeError if one is missing or off by half a frame or more.
    """
    yielded = 0
    for frame in _decode(path, start):
        if frame.time is None:
            raise EpisodeError(f"{path}: expected a time on every frame, found none; export the video again")
        late = float(frame.time) - start
        if late < -0.5 / rate:
            continue
        if abs(late - yielded / rate) >= 0.5 / rate:
            at = f"{start + yielded / rate:.3f} s"
            raise EpisodeError(
                f"{path}: expected a frame at {at}, found the next at {frame.time:.3f} s; export it again"
            )
        yield frame.to_image()
        yielded += 1
        if yielded == count:
            return
    raise EpisodeError(
        f"{path}: expected {count} frames from {start:.3f} s on, found {yielded}; export the video again"
    )


def video_rate(path: Path) -> float | None:
    """Frames per second that the header claims."""
    with _open(path) as container:
        rate = container.streams.video[0].average_rate
        return float(rate) if rate else None


def _unreadable(path: Path, error: object) -> EpisodeError:
    return EpisodeError(f"{path}: expected a readable video, found {error}; export it again")


def _open(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not container.streams.video:
        container.close()
        raise _unreadable(path, "no video stream")
    return container


def _decode(path: Path, start: float = 0.0) -> Iterator[av.VideoFrame]:
    """The frames in order of presentation, from the last key frame before `start` seconds on."""
    with _open(path) as container:
        stream = container.streams.video[0]
        frame = None
        try:
            if start > 0 and stream.time_base:
                container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise _unreadable(path, "a damaged frame")
                yield frame
        except (av.error.FFmpegError, OSError) as error:
            raise _unreadable(path, error) from error
        if frame is None:
            raise _unreadable(path, "no frames")


def resize(image: Image.Image, size: int, *, antialias: bool) -> Image.Image:
    """Squash a frame to size x size, bilinear.

    Without antialiasing it does what the release does (OpenCV's INTER_LINEAR: only the nearest four pixels count).
    """
    if image.size == (size, size):
        return image
    if antialias:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    box: Box = (0, 0, *image.size)
    return image.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)


def frames_array(images: Iterable[Image.Image], size: int, *, antialias: bool = True) -> UInt8[np.ndarray, "t n n 3"]:
    """Frames squashed to a square one by one: only the resized ones are kept in memory."""
    small = [np.asarray(resize(image.convert("RGB"), size, antialias=antialias)) for image in images]
    return np.stack(small) if small else np.zeros((0, size, size, 3), np.uint8)


def nearest(mask: np.ndarray, size: int) -> np.ndarray:
    """Squash one mask [h,w] to [size,size] by picking pixels as OpenCV's INTER_NEAREST does."""
    height, width = mask.shape
    rows, columns = (np.arange(size) * side // size for side in (height, width))
    return mask[rows[:, None], columns]


def masks_array(images: Iterable[Image.Image], size: int) -> Bool[np.ndarray, "t n n"]:
    """Grey images thresholded (lossy video leaves no clean 0 and 255), then resized with `nearest`."""
    masks = [nearest(np.asarray(image.convert("L")) > MASK_THRESHOLD, size) for image in images]
    return np.stack(masks) if masks else np.zeros((0, size, size), np.bool_)
