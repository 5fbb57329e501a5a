"""LeRobot v3.0 (many episodes per file) and v2.1 (one per file): windows aligned, damage left out or named."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.lerobot import builder as lerobot
from data.recordings import skipped
from data.schema import EpisodeError, from_example
from tests.data.release_tree import assert_windows_aligned, build, code_frame, episodes_of, loader, targets, write_video

LENGTHS = [10, 12, 9, 11, 14]
CAMERA = "observation.images.top"
FPS = 10.0


def rows(index: int, length: int, first: int) -> dict:
    return {
        "action": targets(index, length, 3).tolist(),
        "observation.state": targets(index, length, 2).tolist(),
        "timestamp": (np.arange(length) / FPS).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, index),
        "index": np.arange(first, first + length),
        "next.success": np.arange(length) == (length - 1 if index % 2 else -1),
        "task_index": np.zeros(length, np.int64),
    }


def write_table(path: Path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_info(root: Path, version: str, image_dtype: str = "video", **more) -> None:
    features = {
        "action": {"dtype": "float32", "shape": [3]},
        "observation.state": {"dtype": "float32", "shape": [2]},
        "next.success": {"dtype": "bool", "shape": [1]},
        CAMERA: {"dtype": image_dtype, "shape": [48, 64, 3]},
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 2} | more
    (root / "meta" / "info.json").write_text(json.dumps(info))


def video(path: Path, codes, codec: str) -> None:
    options = {"preset": "8", "crf": "35"} if codec == "libsvtav1" else {"crf": "23", "bf": "2"}
    write_video(path, [code_frame(*code, (64, 80)) for code in codes], rate=int(FPS), codec=codec, g="6", **options)


def write_v3(root: Path, codec: str = "libx264") -> Path:
    """Two Parquet and two video files that break between different episodes."""
    paths = {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    paths["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    write_info(root, "v3.0", **paths)
    in_data, in_video = [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]
    meta, start = [], {0: 0.0, 1: 0.0}
    for index, length in enumerate(LENGTHS):
        file = in_video[index]
        span = {"from_timestamp": start[file], "to_timestamp": start[file] + length / FPS}
        start[file] = span["to_timestamp"]
        place = {"chunk_index": 0, "file_index": file} | span
        row = {"episode_index": index, "length": length, "tasks": ["push it"], "stats/action/min": [0.0]}
        row |= {"data/chunk_index": 0, "data/file_index": in_data[index]}
        meta.append(row | {f"videos/{CAMERA}/{key}": value for key, value in place.items()})
    for file in (0, 1):
        chosen = [i for i in range(len(LENGTHS)) if in_data[i] == file]
        parts = [pa.table(rows(i, LENGTHS[i], sum(LENGTHS[:i]))) for i in chosen]
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(parts), path)
        codes = [(i, t) for i in range(len(LENGTHS)) if in_video[i] == file for t in range(LENGTHS[i])]
        video(root / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4", codes, codec)
    table = pa.Table.from_pylist(meta)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    return root


def write_v2(root: Path, stored: bool = False) -> Path:
    """One file per episode; `stored` keeps the frames in the Parquet files."""
    paths = {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    paths["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(root, "v2.1", "image" if stored else "video", **paths)
    for index, length in enumerate(LENGTHS):
        chunk, name = f"chunk-{index // 2:03d}", f"episode_{index:06d}"
        columns = rows(index, length, sum(LENGTHS[:index]))
        if stored:
            columns[CAMERA] = [{"bytes": png(index, t), "path": f"{t}.png"} for t in range(length)]
        else:
            video(root / f"videos/{chunk}/{CAMERA}/{name}.mp4", [(index, t) for t in range(length)], "libx264")
        write_table(root / f"data/{chunk}/{name}.parquet", columns)
    lines = [{"episode_index": i, "tasks": ["push it"], "length": n} for i, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


def png(label: int, frame: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(code_frame(label, frame)).save(buffer, format="png")
    return buffer.getvalue()


WRITERS = {
    "v3": write_v3,
    "v3_av1": lambda root: write_v3(root, "libsvtav1"),
    "v2": write_v2,
    "v2_stored": lambda root: write_v2(root, stored=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_windows_are_aligned_and_episodes_complete(kind, tmp_path):
    root = WRITERS[kind](tmp_path / "src" / "my-set")
    [layout] = lerobot.layouts(root, 40)
    built = build(lerobot.LeRobotBuilder, layout, tmp_path / "out")
    assert not skipped(Path(built.data_dir))["skipped"]
    assert_windows_aligned(loader(tmp_path / "out", "lerobot/my_set_40px:episodes"), masks=False)
    episodes = [from_example(example) for example in episodes_of(built, "episodes")]
    assert [len(episode.frames) for episode in episodes] == LENGTHS
    assert [bool(episode.success) for episode in episodes] == [False, True, False, True, False]
    for index, episode in enumerate(episodes):
        np.testing.assert_array_equal(episode.actions, targets(index, LENGTHS[index], 3))
        np.testing.assert_array_equal(episode.state, targets(index, LENGTHS[index], 2))
        assert episode.text == "push it" and episode.control_hz == FPS


def test_a_video_that_lacks_frames_or_rows_that_lack_a_row_cost_only_their_episode(tmp_path):
    root = write_v2(tmp_path / "set")
    video(root / f"videos/chunk-000/{CAMERA}/episode_000001.mp4", [(1, t) for t in range(11)], "libx264")
    shorter = {key: value[:-1] for key, value in rows(2, LENGTHS[2], 0).items()}
    write_table(root / "data/chunk-001/episode_000002.parquet", shorter)
    late = rows(3, LENGTHS[3], 0)
    late["timestamp"] = late["timestamp"] + np.float32(0.2) * (np.arange(LENGTHS[3]) > 4)
    write_table(root / "data/chunk-001/episode_000003.parquet", late)
    (root / "data/chunk-002/episode_000004.parquet").write_bytes(b"PAR1 nonsense")
    [layout] = lerobot.layouts(root, 24)
    built = build(lerobot.LeRobotBuilder, layout, tmp_path / "out")
    reasons = {entry["episode"]: entry["reason"] for entry in skipped(Path(built.data_dir))["skipped"]}
    assert sorted(reasons) == [1, 2, 3, 4]
    assert "expected 12 frames from 0.000 s on, found 11" in reasons[1]
    assert "expected rows 0 to 8, found 8 rows" in reasons[2]
    assert "timestamp: expected a row every 1/10 s, found row 5 at" in reasons[3]
    assert "episode_000004.parquet: expected a readable Parquet file, found: " in reasons[4]


def spoil_info(root, **changes):
    path = root / "meta/info.json"
    info = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(info))


def two_cameras(root):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    spoil_info(root, features=features | {"observation.images.wrist": features[CAMERA]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: spoil_info(root, codebase_version="v1.6"), "expected one of v2.0, v2.1, v3.0, found v1.6"),
        (
            lambda root: spoil_info(root, fps=None),
            "info.json: expected a LeRobot dataset's info.json, found KeyError: 'fps'",
        ),
        (lambda root: spoil_info(root, fps=0), "expected fps and chunks_size above 0, found 0.0 and 2"),
        (lambda root: (root / "meta/info.json").write_text("{"), "expected a LeRobot dataset's info.json, found JSON"),
        (lambda root: (root / "meta/info.json").unlink(), "info.json, found none; correct --source"),
        (two_cameras, "expected one of the cameras observation.images.top, observation.images.wrist, found None"),
        (lambda root: spoil_info(root, video_path=None), "expected video_path for observation.images.top, found none"),
        (lambda root: (root / "meta/episodes.jsonl").write_text("{"), "episodes.jsonl: expected one JSON object per"),
        (
            lambda root: (root / "meta/episodes.jsonl").write_text("{}\n"),
            "meta: expected the location of each episode, found",
        ),
        (lambda root: (root / "meta/episodes.jsonl").write_text(""), "expected episodes in meta, found none"),
    ],
)
def test_damaged_metadata_gives_one_line(spoil, message, tmp_path):
    write_v2(tmp_path)
    spoil(tmp_path)
    with pytest.raises(EpisodeError) as error:
        [layout] = lerobot.layouts(tmp_path, 24)
        layout.recordings()
    assert message in str(error.value) and "\n" not in str(error.value)
