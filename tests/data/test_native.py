"""ManiSkill's native trajectory files: T + 1 frames for T actions, aligned; files without frames are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from data.maniskill_native import builder as native  # noqa: E402
from data.recordings import skipped  # noqa: E402
from data.schema import EpisodeError, from_example  # noqa: E402
from tests.data.release_tree import assert_windows_aligned, build, code_frame, episodes_of, loader, targets  # noqa: E402

LENGTHS = [10, 12, 9, 11]  # actions


def write_native(folder: Path, name="trajectory.rgb.pd_joint_pos.physx_cpu", cameras=("base_camera",)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        for index, length in enumerate(LENGTHS):
            group = file.create_group(f"traj_{index}")
            group["actions"] = targets(index, length + 1, 8)[:-1]
            group["success"] = np.arange(length) == length - 1
            group["obs/agent/qpos"] = targets(index, length + 1, 9)
            group["obs/extra/tcp_pose"] = np.zeros((length + 1, 7), np.float32)
            for camera in cameras:
                frames = np.stack([code_frame(index, t) for t in range(length + 1)])
                group.create_dataset(
                    f"obs/sensor_data/{camera}/rgb", data=frames, compression="gzip", chunks=(4, 64, 64, 3)
                )
            for actor in ("cube", "table-workspace", "goal_region"):
                group[f"env_states/actors/{actor}"] = np.zeros((length + 1, 13), np.float32)
    episodes = [{"episode_id": i, "success": bool(i % 2)} for i in reversed(range(len(LENGTHS)))]
    kwargs = {"robot_uids": "panda", "control_mode": "pd_joint_pos", "obs_mode": "rgb"}
    described = {"env_info": {"env_id": "PullCube-v1", "env_kwargs": kwargs}, "episodes": episodes}
    (folder / f"{name}.json").write_text(json.dumps(described))
    return folder / f"{name}.h5"


def test_windows_are_aligned_and_episodes_complete(tmp_path):
    write_native(tmp_path / "src")
    [layout] = native.layouts(tmp_path / "src", 40)
    assert layout.name == "PullCube_v1_rgb_pd_joint_pos_physx_cpu" and layout.objects == ("cube",)
    built = build(native.ManiSkillNativeBuilder, layout, tmp_path / "out")
    assert not skipped(Path(built.data_dir))["skipped"]
    assert_windows_aligned(loader(tmp_path / "out", f"maniskill_native/{layout.name}_40px:episodes"), masks=False)
    episodes = [from_example(example) for example in episodes_of(built, "episodes")]
    assert [len(episode.frames) for episode in episodes] == [11, 13, 10, 12]
    for index, episode in enumerate(episodes):
        assert episode.success == bool(index % 2) and episode.episode_id == index
        np.testing.assert_array_equal(episode.actions[-1], episode.actions[-2])
        assert episode.object_positions.shape == (LENGTHS[index] + 1, 1, 3)


def test_damaged_episodes_are_left_out_with_their_reasons(tmp_path):
    path = write_native(tmp_path / "src")
    with h5py.File(path, "a") as file:
        rgb = file["traj_1/obs/sensor_data/base_camera/rgb"][:-1]
        del file["traj_1/obs/sensor_data/base_camera/rgb"], file["traj_2"], file["traj_3/actions"]
        file["traj_1/obs/sensor_data/base_camera/rgb"] = rgb
        file["traj_3/actions"] = np.array([b"pickle"])
    [layout] = native.layouts(path, 24)
    built = build(native.ManiSkillNativeBuilder, layout, tmp_path / "out")
    reasons = {entry["episode"]: entry["reason"] for entry in skipped(Path(built.data_dir))["skipped"]}
    assert sorted(reasons) == [1, 2, 3]
    assert "expected one more frame than actions, found 12 frames for 12 actions" in reasons[1]
    assert "expected the episode traj_2, found none" in reasons[2]
    assert "actions: expected a numeric dataset, found dtype |S6, not opened" in reasons[3]


def test_a_file_without_frames_or_with_several_cameras_and_a_damaged_json_give_one_line(tmp_path):
    path = write_native(tmp_path / "none", cameras=())
    with pytest.raises(EpisodeError, match=f"expected a file with obs/sensor_data, found {path.name}; replay them"):
        native.layouts(path, 24)
    write_native(tmp_path / "none", name="trajectory.rgb")  # beside one without frames
    assert [layout.path.name for layout in native.layouts(tmp_path / "none", 24)] == ["trajectory.rgb.h5"]
    path = write_native(tmp_path / "two", cameras=("base_camera", "hand_camera"))
    with pytest.raises(EpisodeError, match="expected one of base_camera, hand_camera, found None; name one"):
        native.layouts(path, 24)
    assert native.layouts(path, 24, "hand_camera")[0].camera == "hand_camera"
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(EpisodeError, match="expected the episodes and env_info of the h5 file, found TypeError"):
        native.layouts(path, 24, "hand_camera")
    with pytest.raises(EpisodeError, match=r"expected a trajectory .h5 file with its .json, found none"):
        native.layouts(tmp_path / "two" / "nothing", 24)
