"""A LeRobot dataset (v3.0, v2.1, v2.0) with video or stored images; LeRobot itself is not needed.

SOURCE is the folder that contains meta/, data/ and videos/. Rows become actions (`action`) and state
(`observation.state`), raw; `next.success`, where present, says whether an episode succeeded. Read the result as
`lerobot/NAME_512px:episodes`; episodes 0 to 9 are validation.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from data.lerobot.metadata import Info, LeRobotRecording, episodes, read_info
from data.names import word
from data.recordings import Layout, Recording, RecordingsBuilder
from data.schema import Episode, EpisodeError, Spec
from data.video import clip, frames_array

ACTION, STATE, SUCCESS = "action", "observation.state", "next.success"


@dataclass(frozen=True)
class LeRobotLayout(Layout):
    """One LeRobot dataset seen through one camera."""

    info: Info
    camera: str
    spec: Spec
    metadata: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The folder's name."""
        return word(self.info.root.resolve().name)

    def recordings(self) -> list[Recording]:
        """Every episode listed in meta."""
        return list(episodes(self.info, self.camera))

    def read(self, recording: Recording) -> tuple[Episode, str]:
        """One episode; the numbers of rows and frames must match meta."""
        assert isinstance(recording, LeRobotRecording)
        columns = _columns(recording, [*self._numeric(), *([] if recording.video else [self.camera])], self.info.fps)
        if recording.video is not None:
            images = clip(recording.video, recording.start, recording.length, self.info.fps)
        else:
            images = _stored_images(recording, columns[self.camera])
        episode = Episode(
            frames=frames_array(images, self.spec.image_size[0]),
            actions=_floats(recording, ACTION, columns),
            state=_floats(recording, STATE, columns) if STATE in columns else None,
            success=any(map(bool, columns.get(SUCCESS, ()))),
            text=recording.text,
            episode_id=recording.episode_id,
            robot_id=0,
            control_hz=self.info.fps,
        )
        return episode, ""

    def _numeric(self) -> list[str]:
        return [key for key in (ACTION, STATE, SUCCESS) if key in self.info.features]


def _columns(recording: LeRobotRecording, keys: list[str], fps: float) -> dict[str, list[Any]]:
    """The episode's rows as one list per key, checked to be complete, in order and correctly timed."""
    clock = ["frame_index", "timestamp"]
    try:
        only = [("episode_index", "==", recording.episode_id)]
        table = pq.read_table(recording.data, columns=[*keys, *clock, "episode_index"], filters=only)
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EpisodeError(
            f"{recording.data}: expected a readable Parquet file, found: {reason}; restore it"
        ) from error
    columns = {key: table.column(key).to_pylist() for key in [*keys, *clock]}
    order = columns["frame_index"]
    if len(order) != recording.length or order != list(range(recording.length)):
        wrong = f"{len(order)} rows" if len(order) != recording.length else "a different order"
        raise EpisodeError(
            f"{recording.name}: expected rows 0 to {recording.length - 1}, found {wrong}; restore the data"
        )
    late = np.abs(np.array(columns["timestamp"], np.float64) - np.arange(recording.length) / fps)
    if not (late < 0.5 / fps).all():
        row = int(np.argmax(~(late < 0.5 / fps)))
        wrong = f"row {row} at {columns['timestamp'][row]} s"
        raise EpisodeError(f"{recording.name}: timestamp: expected a row every 1/{fps:g} s, found {wrong}; restore it")
    return columns


def _floats(recording: LeRobotRecording, key: str, columns: dict[str, list[Any]]) -> np.ndarray:
    """A column of numbers or equal-length lists as float32 [t,a]."""
    try:
        array = np.array(columns[key], np.float32)
    except (ValueError, TypeError) as error:
        raise EpisodeError(
            f"{recording.name}: {key}: expected numbers in every row, found {error}; restore it"
        ) from error
    return array.reshape(len(array), -1)


def _stored_images(recording: LeRobotRecording, cells: list[Any]) -> Iterator[Image.Image]:
    for index, cell in enumerate(cells):
        encoded = cell.get("bytes") if isinstance(cell, dict) else None
        try:
            yield Image.open(io.BytesIO(encoded or b""))
        except (OSError, Image.DecompressionBombError) as error:
            raise EpisodeError(f"{recording.name}: expected an encoded image in row {index}, found none") from error


def layouts(source: Path, image_size: int, camera: str | None = None) -> list[LeRobotLayout]:
    """The layout of the dataset; EpisodeError if it has no actions, or several cameras and none is named."""
    info = read_info(source)
    key = info.camera(camera)
    if info.features[key].get("dtype") == "video" and not info.video_path:
        raise EpisodeError(f"{source}: meta/info.json: expected video_path for {key}, found none; restore it")
    spec = Spec(
        image_size=(image_size, image_size),
        action_dim=_width(info, ACTION),
        state_dim=_width(info, STATE) if STATE in info.features else None,
    )
    metadata = {"actions": f"{ACTION}, raw", "control_hz": info.fps, "camera": key, "lerobot_version": info.version}
    return [LeRobotLayout(info, key, spec, metadata)]


def _width(info: Info, key: str) -> int:
    try:
        return int(np.prod([int(size) for size in info.features[key]["shape"]]))
    except (KeyError, TypeError, ValueError) as error:
        where = info.root / "meta" / "info.json"
        raise EpisodeError(f"{where}: features: expected {key} with a shape, found none; restore it") from error


class LeRobotBuilder(RecordingsBuilder):
    """A LeRobot dataset seen through one camera; actions and state are raw."""

    name = "lerobot"
    VERSION = tfds.core.Version("1.0.0")
