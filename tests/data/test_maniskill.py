"""The release's ManiSkill layout: aligned despite its quirks, damage skipped with a reason, builds that resume."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from data import recordings, schema  # noqa: E402
from data.maniskill import builder as maniskill  # noqa: E402
from data.maniskill.robots import full_qpos  # noqa: E402
from data.recordings import SKIPPED, BuildError, skipped  # noqa: E402
from data.release import robot_of  # noqa: E402
from data.schema import EpisodeError  # noqa: E402
from tests.data.release_tree import (  # noqa: E402
    assert_windows_aligned,
    build,
    episodes_of,
    label_of,
    loader,
    read_code,
    targets,
    write_index,
    write_trajectory,
    write_video,
)

ROOT = Path(__file__).parents[2]
CUBE = "ppo/panda/PullCube-v2"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Success from videos, one of them a frame short; fail from image folders; play with other numbers of objects."""
    source = tmp_path_factory.mktemp("maniskill")
    for index, length in enumerate([12, 9, 14, 11]):
        folder = source / CUBE / "success" / f"traj_{index:06d}"
        write_trajectory(folder, label_of(0, index), length, frames_missing=index == 2, masks_missing=index == 3)
        folder = source / CUBE / "fail" / f"traj_{index:06d}"
        write_trajectory(folder, label_of(1, index), length, stored="folder", success=False)
        folder = source / "play/panda/TableOnly-v2/push_only" / f"traj_{index:06d}"
        write_trajectory(folder, label_of(2, index), length, num_objects=1 + index, success=False)
    for folder in (CUBE + "/success", CUBE + "/fail", "play/panda/TableOnly-v2/push_only"):
        write_index(source / folder, "panda")
    folder = source / "ppo/ur10e/PushT-v2/success"
    write_trajectory(folder / "traj_000000", label_of(3, 0), 6, uid="ur10e_stick")
    write_index(folder, "ur10e_stick")
    return source


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """The panda dataset at 48 px, read by two processes."""
    data_dir = tmp_path_factory.mktemp("datasets")
    layout = next(layout for layout in maniskill.layouts(tree, 48) if layout.name == "panda")
    return build(maniskill.ManiSkillBuilder, layout, data_dir, workers=2)


SPLITS = ("PullCube_v2_fail", "PullCube_v2_success", "TableOnly_v2_push_only")


@pytest.mark.parametrize("split", SPLITS)
def test_windows_action_rows_and_masks_are_aligned_frame_by_frame(built, split):
    windows = loader(built.data_dir_root, f"maniskill/panda_48px:{split}")
    assert_windows_aligned(windows, masks=True)


def test_splits_ids_success_and_text_are_those_of_the_release(built):
    assert tuple(sorted(built.info.splits)) == SPLITS
    for split in SPLITS:
        examples = episodes_of(built, split)
        assert [example["episode_id"] for example in examples] == [0, 1, 2, 3]
        assert {bool(example["success"]) for example in examples} == {split.endswith("success")}
        assert {example["robot_id"] for example in examples} == {0}
        assert {schema.from_example(example).text for example in examples} == {"Pull the cube."}
        assert {float(example["control_hz"]) for example in examples} == {20.0}


def test_a_missing_last_frame_cuts_the_rows_and_is_noted(built):
    lengths = [len(example["frames"]) for example in episodes_of(built, "PullCube_v2_success")]
    assert lengths == [12, 9, 13, 10]
    notes = skipped(Path(built.data_dir))["notes"]
    assert [(note["split"], note["episode"]) for note in notes] == [("PullCube_v2_success", i) for i in (2, 3)]
    assert notes[0]["note"].endswith(
        "cut to 13 frames, found 13 of rgb, 14 of foreground_mask, 14 of target_qpos, 14 of qpos"
    )


def test_objects_that_a_trajectory_lacks_never_interact(built):
    windows = loader(built.data_dir_root, "maniskill/panda_48px:TableOnly_v2_push_only")
    store = next(iter(windows.stores.values()))
    assert schema.from_example(episodes_of(built, "TableOnly_v2_push_only")[0]).object_positions.shape == (12, 4, 3)
    interacting = store.interacting(distance=0.25, movement=0.002, buffer=0)
    assert [frames.tolist() for frames in interacting] == [[6], [4], [7], [5]]


def test_every_robot_of_the_tree_becomes_a_dataset(tree):
    assert {layout.name: layout.spec.action_dim for layout in maniskill.layouts(tree, 48)} == {"panda": 9, "ur10e": 6}
    part = maniskill.layouts(tree / CUBE / "success", 48)
    assert [(layout.name, {r.split for r in layout.recordings()}) for layout in part] == [
        ("panda", {"PullCube_v2_success"})
    ]


@pytest.mark.parametrize(
    ("uid", "row", "expected"),
    [
        ("panda", [1, 2, 3, 4, 5, 6, 7, 0.03], [1, 2, 3, 4, 5, 6, 7, 0.03, 0.03]),
        ("panda_v2", [1, 2, 3, 4, 5, 6, 7, -0.01], [1, 2, 3, 4, 5, 6, 7, 0, 0]),
        ("panda_closed", [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0, 0]),
        ("xarm6_robotiq", [1, 2, 3, 4, 5, 6, 0.405], [1, 2, 3, 4, 5, 6, 0.405, 0.44, 0.405, 0.44, -0.44, -0.44]),
        ("xarm6_robotiq", [1, 2, 3, 4, 5, 6, 9], [1, 2, 3, 4, 5, 6, 0.81, 0.88, 0.81, 0.88, -0.88, -0.88]),
        ("xarm6_robotiq_closed", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0.81, 0.88, 0.81, 0.88, -0.88, -0.88]),
        ("ur10e_stick", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]),
        ("ur10e_stick", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]),
    ],
)
def test_targets_expand_to_all_joints(uid, row, expected):
    rows = full_qpos(robot_of(uid), np.array([row], np.float32))
    np.testing.assert_allclose(rows, np.array([expected], np.float32), rtol=0, atol=1e-6)  # float32 rounding
    assert rows.dtype == np.float32
    assert [robot_of(name).robot_id for name in ("panda", "xarm6_robotiq", "ur10e")] == [0, 1, 2]


def write_h5(folder, **arrays):
    with h5py.File(folder / "metadata.h5", "a") as file:
        for key, value in arrays.items():
            del file[key]
            if value is not None:
                file[key] = value


def pickle_targets(folder):
    write_h5(folder, target_qpos=np.frombuffer(b"cos\nsystem\n(S'touch /tmp/never'\ntR.", np.uint8))
    with h5py.File(folder / "metadata.h5", "a") as file:
        file["target_qpos"].attrs["_pickled"] = True


def objects_in_pieces(folder):
    write_h5(folder, object_poses=None)
    with h5py.File(folder / "metadata.h5", "a") as file:
        file.create_group("object_poses")["elem_0"] = np.zeros(3)


def link_elsewhere(folder):
    write_h5(folder, target_qpos=h5py.ExternalLink("other.h5", "/target_qpos"))


def claim_terabytes(folder):
    write_h5(folder, target_qpos=None)
    with h5py.File(folder / "metadata.h5", "a") as file:
        file.create_dataset("target_qpos", shape=(2**38, 8), dtype=np.float32, chunks=(1024, 8))


def text_targets(folder):
    write_h5(folder, target_qpos=np.array([b"a", b"b"]))


def not_finite(folder):
    rows = targets(1, 9, 8)
    rows[3, 2] = np.nan
    write_h5(folder, target_qpos=rows)


def five_columns(folder):
    write_h5(folder, target_qpos=targets(1, 9, 5))


def truncate_h5(folder):
    data = (folder / "metadata.h5").read_bytes()
    (folder / "metadata.h5").write_bytes(data[: len(data) // 2])


def no_h5(folder):
    (folder / "metadata.h5").unlink()


def truncate_video(folder):
    path = folder / "front_lower_camera_rgb.mp4"
    path.write_bytes(path.read_bytes()[:-200])


def scramble_video(folder):
    path = folder / "front_lower_camera_rgb.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 900
    data[at : at + 300] = bytes(300)
    path.write_bytes(data)


def no_video(folder):
    path = folder / "front_lower_camera_rgb.mp4"
    path.rename(folder / "rear_camera_rgb.mp4")


def three_frames_short(folder):
    from tests.data.release_tree import code_frame

    write_video(folder / "front_lower_camera_rgb.mp4", [code_frame(1, t) for t in range(6)])


def empty_masks(folder):
    write_video(folder / "front_lower_camera_foreground_mask.mp4", [np.ones((64, 64, 3), np.uint8)] * 9)


def no_masks(folder):
    (folder / "front_lower_camera_foreground_mask.mp4").unlink()


DAMAGE = [
    (pickle_targets, "target_qpos: expected a numeric dataset, found a pickled object array, not opened"),
    (objects_in_pieces, "object_poses: expected a numeric dataset, found a group"),
    (link_elsewhere, "target_qpos: expected a numeric dataset, found a link, not opened"),
    (claim_terabytes, "target_qpos: expected a numeric dataset, found 8192.0 GiB, not opened"),
    (text_targets, "target_qpos: expected a numeric dataset, found dtype |S1, not opened"),
    (not_finite, "actions: expected finite values, found "),
    (five_columns, "target_qpos: expected 7 or 8 columns for panda, found 5"),
    (truncate_h5, "metadata.h5: expected a readable HDF5 file, found: "),
    (no_h5, "metadata.h5: expected an HDF5 file, found none"),
    (truncate_video, "front_lower_camera_rgb.mp4: expected a readable video, found "),
    (scramble_video, "front_lower_camera_rgb.mp4: expected a readable video, found "),
    (no_video, "front_lower_camera_rgb: expected a video or image folder, found cameras rear_camera; see --camera"),
    (three_frames_short, "expected as many frames as rows, found 6 of rgb, 9 of foreground_mask, 9 of target_qpos"),
    (empty_masks, "expected foreground (above 127 of 255), found none"),
    (
        no_masks,
        "front_lower_camera_foreground_mask: expected a video or image folder, found cameras front_lower_camera",
    ),
]


def test_each_damaged_episode_is_left_out_with_its_reason_and_the_others_are_kept(tmp_path):
    group = tmp_path / "src" / CUBE / "success"
    count = len(DAMAGE) + 3
    for index in range(count):
        write_trajectory(group / f"traj_{index:06d}", index, 9)
    for index, (spoil, _) in enumerate(DAMAGE, start=2):
        spoil(group / f"traj_{index:06d}")
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    built = build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    examples = episodes_of(built, "PullCube_v2_success")
    assert [example["episode_id"] for example in examples] == [0, 1, count - 1]
    reasons = {entry["episode"]: entry["reason"] for entry in skipped(Path(built.data_dir))["skipped"]}
    assert sorted(reasons) == list(range(2, count - 1))
    for index, (_, message) in enumerate(DAMAGE, start=2):
        assert message in reasons[index], (index, reasons[index])
        assert f"traj_{index:06d}" in reasons[index] and "\n" not in reasons[index]
    assert not Path("/tmp/never").exists()


def test_a_gap_in_numbered_images_is_refused(tmp_path):
    folder = tmp_path / CUBE / "fail" / "traj_000000"
    write_trajectory(folder, 1, 9, stored="folder")
    (folder / "front_lower_camera_rgb" / "4.jpg").unlink()
    [layout] = maniskill.layouts(tmp_path, 32)
    with pytest.raises(EpisodeError, match="front_lower_camera_rgb: expected image 4 after 3, found 5"):
        layout.read(layout.recordings()[0])


def test_nothing_usable_gives_one_line_and_no_dataset(tmp_path):
    folder = tmp_path / "src" / CUBE / "success" / "traj_000000"
    write_trajectory(folder, 1, 9)
    no_h5(folder)
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    with pytest.raises(
        BuildError, match=r"panda_32px: expected a usable episode, found none; the first: .*metadata.h5"
    ):
        build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("dataset_info.json"))


def test_two_folders_of_one_id_and_a_tree_without_trajectories_are_refused(tmp_path):
    with pytest.raises(EpisodeError, match=r"expected folders traj_000000, traj_000001, .* below it, found none"):
        maniskill.layouts(tmp_path, 32)
    for name in ("traj_1", "traj_000001"):
        write_trajectory(tmp_path / CUBE / "success" / name, 1, 5)
    with pytest.raises(EpisodeError, match=r"expected one trajectory 1, found .*traj_000001 too"):
        maniskill.layouts(tmp_path, 32)


def test_frames_are_squashed_as_the_release_does(tmp_path):
    cv2 = pytest.importorskip("cv2")
    from PIL import Image

    from data.video import nearest, resize

    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for size in (48, 56, 20):
        expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        resized = np.asarray(resize(Image.fromarray(image), size, antialias=False))
        assert np.abs(resized.astype(int) - expected).max() <= 1  # fixed point against float
        mask = image[..., 0] > 127
        chosen = cv2.resize(mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)
        np.testing.assert_array_equal(nearest(mask, size), chosen > 0)


def test_a_split_without_a_usable_episode_is_left_out(tmp_path):
    for group in ("success", "fail"):
        write_trajectory(tmp_path / "src" / CUBE / group / "traj_000000", 1, 5)
    no_h5(tmp_path / "src" / CUBE / "fail" / "traj_000000")
    [layout] = maniskill.layouts(tmp_path / "src", 32)
    built = build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    assert list(built.info.splits) == ["PullCube_v2_success"]
    assert [entry["split"] for entry in skipped(Path(built.data_dir))["skipped"]] == ["PullCube_v2_fail"]


def test_a_full_disk_gives_one_line_and_keeps_complete_shards(tmp_path, monkeypatch):
    write_trajectory(tmp_path / "src" / CUBE / "fail" / "traj_000000", 1, 5)
    [layout] = maniskill.layouts(tmp_path / "src", 32)

    def full(path, examples):
        list(examples)
        raise RuntimeError("close() failed:\nNo space left on device")

    monkeypatch.setattr(recordings.file_adapters.ArrayRecordFileAdapter, "write_examples", full)
    with pytest.raises(
        BuildError, match=r"found: close.. failed: No space left on device; free some disk space and run the same"
    ):
        build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.fixture
def long_tree(tmp_path) -> Path:
    """More episodes than a shard holds."""
    for index in range(20):
        write_trajectory(tmp_path / "src" / CUBE / "success" / f"traj_{index:06d}", index, 6)
    return tmp_path / "src"


class StopError(Exception):
    """Stands for a kill."""


def test_a_stopped_build_resumes_and_gives_the_same_dataset(long_tree, tmp_path, monkeypatch):
    [layout] = maniskill.layouts(long_tree, 32)
    whole = build(maniskill.ManiSkillBuilder, layout, tmp_path / "whole")
    write, seen = recordings.write_shard, []

    def stopping(shard):
        seen.append(shard.path.name)
        if len(seen) == 2:
            raise StopError
        write(shard)

    monkeypatch.setattr(recordings, "write_shard", stopping)
    with pytest.raises(StopError):
        build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("dataset_info.json"))
    seen += ["no stop"]
    resumed = build(maniskill.ManiSkillBuilder, layout, tmp_path / "out")
    names = [f"PullCube_v2_success-{i:05d}.array_record" for i in range(3)]
    assert seen == [names[0], names[1], "no stop", names[1], names[2]]
    assert not list(Path(resumed.data_dir).parent.glob("*.partial"))
    records = [
        {path.name: path.read_bytes() for path in Path(builder.data_dir).glob("*.array_record*")}
        for builder in (whole, resumed)
    ]
    assert records[0] == records[1] and len(records[0]) == 3


def test_a_repaired_episode_is_read_again_when_a_build_resumes(long_tree, tmp_path):
    bad = long_tree / CUBE / "success" / "traj_000012"
    no_video(bad)
    [layout] = maniskill.layouts(long_tree, 32)
    with pytest.raises(EpisodeError, match="found cameras rear_camera"):
        build(maniskill.ManiSkillBuilder, layout, tmp_path / "out", strict=True)
    (bad / "rear_camera_rgb.mp4").rename(bad / "front_lower_camera_rgb.mp4")
    built = build(maniskill.ManiSkillBuilder, layout, tmp_path / "out", strict=True)
    assert len(episodes_of(built, "PullCube_v2_success")) == 20


def children(pid: int) -> list[int]:
    """The processes that a process started, as Linux tells."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
def test_a_killed_command_resumes_and_reports_what_it_left_out(long_tree, tmp_path):
    no_h5(long_tree / CUBE / "success" / "traj_000003")
    command = [
        sys.executable,
        "-m",
        "data.build",
        "maniskill",
        f"--source={long_tree}",
        f"--data_dir={tmp_path / 'out'}",
    ]
    command += ["--image_size=32", "--workers=2", "--codec=jpeg"]
    partial = tmp_path / "out/maniskill/panda_32px_jpeg/1.0.0.partial"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(partial.glob("*.json")):
            pass
        workers = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(alive, workers))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "split PullCube_v2_success: 19 episodes" in done.stdout
    assert f"1 episodes left out, 0 repaired, see {SKIPPED}" in done.stdout
    assert "metadata.h5: expected an HDF5 file, found none" in done.stdout
    report = json.loads((partial.parent / "1.0.0" / SKIPPED).read_text())
    assert [entry["episode"] for entry in report["skipped"]] == [3]
    store = next(iter(loader(tmp_path / "out", "maniskill/panda_32px_jpeg:PullCube_v2_success").stores.values()))
    frames, _ = store.recorded(5, range(6))  # codes are read from unmasked frames
    assert [read_code(frame) for frame in frames] == [(6, t) for t in range(6)]
    assert [path.name for path in partial.parent.iterdir()] == ["1.0.0"]
