"""The meta folder of a LeRobot dataset: which rows and which segment of which video make up each episode.

v3.0 keeps many episodes in one Parquet and one MP4 file, found through meta/episodes/; v2.1 (and v2.0) keeps one per
episode and lists them in meta/episodes.jsonl.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.recordings import Recording
from data.schema import EpisodeError

SPLIT = "episodes"
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class LeRobotRecording(Recording):
    """An episode: its Parquet file, and its video from `start` seconds on (None: frames are in the Parquet file)."""

    data: Path
    video: Path | None
    start: float
    length: int
    text: str


@dataclass(frozen=True)
class Info:
    """The parts of meta/info.json that are needed; `features` maps keys to {"dtype", "shape"}."""

    root: Path
    version: str
    fps: float
    features: dict[str, dict[str, Any]]
    data_path: str
    video_path: str | None
    chunks_size: int

    @property
    def cameras(self) -> list[str]:
        """Keys of the camera features."""
        return [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]

    def camera(self, wanted: str | None) -> str:
        """The key of a camera given in full or by its suffix (such as `top`); by default the only camera."""
        matches = [key for key in self.cameras if wanted in (None, key, key.rpartition(".")[2])]
        if len(matches) != 1:
            known = ", ".join(self.cameras) or "none"
            raise EpisodeError(f"{self.root}: --camera: expected one of the cameras {known}, found {wanted}; name one")
        return matches[0]


def read_info(root: Path) -> Info:
    """meta/info.json; EpisodeError in one line if it is missing, damaged or of another version."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version = str(info["codebase_version"])
        if version not in VERSIONS:
            raise EpisodeError(
                f"{path}: codebase_version: expected one of {', '.join(VERSIONS)}, found {version}; "
                f"convert it with lerobot's script"
            )
        fps, chunks_size = float(info["fps"]), int(info.get("chunks_size", 1000))
        if not (fps > 0 and chunks_size > 0):
            raise EpisodeError(
                f"{path}: expected fps and chunks_size above 0, found {fps} and {chunks_size}; correct it"
            )
        features = {key: dict(feature) for key, feature in info["features"].items()}
        return Info(root, version, fps, features, info["data_path"], info.get("video_path"), chunks_size)
    except OSError as error:
        raise EpisodeError(f"{path}: expected a LeRobot dataset's info.json, found none; correct --source") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, EpisodeError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise EpisodeError(f"{path}: expected a LeRobot dataset's info.json, found {reason}; restore it") from error


def episodes(info: Info, camera: str) -> list[LeRobotRecording]:
    """Every episode, ids ascending; EpisodeError if the list itself is damaged."""
    rows = _rows_v3(info, camera) if info.version.startswith("v3") else _rows_v2(info)
    by_id: dict[int, LeRobotRecording] = {}
    for row in rows:
        recording = _recording(info, camera, row)
        if recording.episode_id in by_id:
            raise EpisodeError(f"{info.root}: expected one episode {recording.episode_id}, found two; restore meta")
        by_id[recording.episode_id] = recording
    if not by_id:
        raise EpisodeError(f"{info.root}: expected episodes in meta, found none; restore it")
    return [by_id[index] for index in sorted(by_id)]


def _rows_v2(info: Info) -> Iterator[dict[str, Any]]:
    path = info.root / "meta" / "episodes.jsonl"
    try:
        yield from [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise EpisodeError(f"{path}: expected one JSON object per line, found {error}; restore it") from error


def _rows_v3(info: Info, camera: str) -> Iterator[dict[str, Any]]:
    """meta/episodes/*/*.parquet without the statistics; a camera's columns lose their prefix."""
    prefix = f"videos/{camera}/"
    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    wanted += [f"{prefix}{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    for path in sorted((info.root / "meta" / "episodes").rglob("*.parquet")):
        try:
            file = pq.ParquetFile(path)
            columns = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise EpisodeError(f"{path}: expected a readable Parquet file, found {error}; restore it") from error


def _recording(info: Info, camera: str, row: dict[str, Any]) -> LeRobotRecording:
    prefix = f"videos/{camera}/"
    has_video = info.features[camera]["dtype"] == "video"
    try:
        index, length = int(row["episode_index"]), int(row["length"])
        start = 0.0
        if info.version.startswith("v3"):
            data = info.data_path.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            places = {"chunk_index": row.get(f"{prefix}chunk_index"), "file_index": row.get(f"{prefix}file_index")}
            start = float(row[f"{prefix}from_timestamp"]) if has_video else 0.0
        else:
            places = {"episode_chunk": index // info.chunks_size, "episode_index": index}
            data = info.data_path.format(**places)
        video = str(info.video_path).format(video_key=camera, **places) if has_video else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EpisodeError(
            f"{info.root}: meta: expected the location of each episode, found {reason}; restore it"
        ) from error
    paths = [info.root / part for part in (data, video) if part is not None]
    return LeRobotRecording(
        split=SPLIT,
        episode_id=index,
        name=f"{info.root} episode {index}",
        files=tuple(path for path in paths if path.is_file()),
        data=paths[0],
        video=paths[1] if has_video else None,
        start=start,
        length=length,
        text=", ".join(map(str, row.get("tasks") or ())),
    )
