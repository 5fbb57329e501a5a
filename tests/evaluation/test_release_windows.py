"""The release's evaluation handles: the right frames and rows of the right trajectory, wherever the tree lies."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data.iws.builder import IWSBuilder
from data.iws.builder import layouts as iws_layouts
from data.maniskill.builder import ManiSkillBuilder
from data.maniskill.builder import layouts as maniskill_layouts
from data.pipeline import WindowLoader
from rlawm_jax.evaluation import chunking, release_windows
from rlawm_jax.evaluation.open_loop import OpenLoop
from rlawm_jax.evaluation.results import SINGLE
from tests.data.release_tree import build, label_of, read_code, unmasked, write_index, write_trajectory
from tests.tiny_models import tiny_config, tiny_world

SIZE, LENGTH = 28, 70
AUTHORS = "/home/author/rla-wm/data/maniskill"
GROUPS = ("success", "fail")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Built datasets of two panda folders and one IWS task; frame numbers are pictures, and action rows say them."""
    source, datasets = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("datasets")
    for g, group in enumerate(GROUPS):
        folder = source / "ppo/panda/PullCube-v2" / group
        for i in (0, 3):
            write_trajectory(folder / f"traj_{i:06d}", label_of(g, i), LENGTH, success=group == "success")
        write_index(folder, "panda")
    task = source / "iws/pusht"
    rows = np.stack([np.arange(LENGTH), np.full(LENGTH, 7), np.zeros(LENGTH), np.zeros(LENGTH)], axis=1)
    write_trajectory(
        task / "traj_000001", 7, LENGTH, camera="camera_0", num_objects=0, target_rows=rows.astype(np.float32)
    )
    write_index(task, "iws")
    for layout in maniskill_layouts(source / "ppo", SIZE):
        build(ManiSkillBuilder, layout, datasets)
    for layout in iws_layouts(source / "iws", SIZE):
        build(IWSBuilder, layout, datasets)
    return datasets


def config(root: Path, iws: bool = False):
    dims = {"0": 4} if iws else {"0": 9}
    return tiny_config(denoiser__action_dims=dims, data__root=str(root), data__max_horizon=15, eval__chunk=15)


def handle(horizon: int, *, group="success", traj: object = 3, frame=4, **changes) -> dict:
    return {
        "version": 1,
        "dataset_idx": 0,
        "group_name": "ppo",
        "traj_id": traj,
        "frame_id": frame,
        "sampled_horizon": horizon,
        "feasible_horizon": 60,
        "camera_keys": ["front_lower_camera"],
        "rgb_variant": None,
        "interaction_frame_indices": [],
        "dataset_root": f"{AUTHORS}/ppo/panda/PullCube-v2/{group}",
    } | changes


def write(path: Path, **by_horizon: list[dict]) -> Path:
    lists = {name.removeprefix("h"): found for name, found in by_horizon.items()}
    path.write_text(json.dumps({"meta": {"cache_format_version": 1}, "handles_by_horizon": lists}))
    return path


def chosen(path: Path, run):
    """(loader, windows) of a handle file."""
    found = release_windows.read_handles(path)
    release_windows.use_datasets(run, found, path)
    loader = unmasked(WindowLoader(run.data, with_frames=True))
    return loader, release_windows.handle_windows(found, loader, run, path)


def test_handles_lead_to_the_frames_they_name_whatever_the_authors_root_was(root, tmp_path):
    file = write(
        tmp_path / "h.json",
        h5=[
            handle(5),
            handle(5, group="fail", traj="000003"),
            handle(5, dataset_root="D:\\ppo\\panda\\PullCube-v2\\fail"),
        ],
        h30=[handle(30, traj=0, frame=40)],
    )
    run = config(root)
    loader, windows = chosen(file, run)
    expected = {5: [(label_of(0, 3), 4), (label_of(1, 3), 4), (label_of(1, 3), 4)], 30: [(label_of(0, 0), 40)]}
    for horizon, starts in expected.items():
        found = [loader.load_window(window, [0, horizon - 1])["frames"] for window in windows[horizon]]
        codes = [[read_code(frame) for frame in frames] for frames in found]
        assert codes == [[(label, first), (label, first + horizon - 1)] for label, first in starts]


@pytest.mark.parametrize(
    ("iws", "protocol", "last_action", "horizon", "rows", "frames"),
    [
        (False, "release", False, 15, [range(14)], [14]),
        (False, "release", False, 30, [range(9), range(10, 19), range(20, 29)], [9, 19, 29]),
        (False, "exact", False, 30, [range(10), range(10, 20), range(20, 29)], [10, 20, 29]),
        (True, "release", False, 60, [range(i, i + 15) for i in (0, 15, 30, 45)], [14, 29, 44, 59]),
        (True, "exact", True, 16, [range(9), range(8, 16)], [8, 15]),
    ],
)
def test_a_protocol_feeds_its_rows_and_compares_with_its_frames(
    root, tmp_path, iws, protocol, last_action, horizon, rows, frames
):
    one = handle(horizon, frame=5)
    if iws:
        one |= {"dataset_root": "/there/iws_converted/pusht", "traj_id": 1}
    file, run = write(tmp_path / "h.json", **{f"h{horizon}": [one]}), config(root, iws)
    loader, windows = chosen(file, run)
    cut = release_windows.cut_of(protocol, run, {"converted": {"last_action": last_action}}, iws=iws)
    loop = OpenLoop(
        tiny_world(denoiser__action_dims=run.denoiser.action_dims.to_dict()), run, loader, images=False, cut=cut
    )
    seen = []
    loop._encode = lambda state, frames: seen.append(frames) or np.zeros((*frames.shape[:2], 4, 384))
    batch = loop.load(windows[horizon], images=False)
    assert [read_code(frame)[1] - 5 for frame in seen[0][:, 0]] == [0, *frames]
    for chunk, count, expected in zip(batch.chunks.actions[:, 0], batch.chunks.num_actions[:, 0], rows, strict=True):
        assert count == len(expected)
        np.testing.assert_array_equal(chunk[:count, 0], [5 + row for row in expected])
        assert not np.any(chunk[count:])


def test_a_model_trained_with_the_last_action_is_given_it_with_and_without_handles(root):
    run = config(root, True)
    with run.unlocked():
        run.data.last_action = True
        group = {"datasets": (f"iws/pusht_{SIZE}px:episodes",), "weight": 1.0, "min_start_frame": 0}
        run.data.groups = {"iws": group}
    world = tiny_world(denoiser__action_dims=run.denoiser.action_dims.to_dict())
    loop = OpenLoop(world, run, WindowLoader(run.data, with_frames=True), images=False)
    plain = chunking.exact(16, run.eval.chunk - 1)
    assert loop.cut(16) == release_windows.cut_of("exact", run, {}, iws=True)(16)
    assert loop.cut(16) == [piece._replace(rows=piece.rows + 1) for piece in plain]


@pytest.mark.slow
def test_the_row_of_the_table_is_the_mean_over_all_handles(root, tmp_path):
    file = write(tmp_path / "h.json", h3=[handle(3, frame=i) for i in (30, 32)], h5=[handle(5, frame=31)])
    run = config(root)
    with run.unlocked():
        run.eval.update({"samples": 1, "batch_size": 2})
        run.sampler.steps = 2
    loader, windows = chosen(file, run)
    model = tiny_world(denoiser__action_dims={"0": 9}, data__max_horizon=15, backbone=True)
    loop = OpenLoop(model, run, loader, images=True)
    table, pooled = release_windows.evaluate_handles(loop, windows)
    assert [result.windows for result in table.table] == [2, 1] and pooled.windows == 3
    by_horizon = [result.rows[SINGLE].metrics for result in table.table]
    for name in ("dino_l1", "ssim"):
        mean = (2 * by_horizon[0][name].value + by_horizon[1][name].value) / 3
        np.testing.assert_allclose(pooled.rows[SINGLE].metrics[name].value, mean, rtol=1e-6)
    found = pooled.rows[SINGLE].metrics
    row = f"| RLA-WM | - | {found['ssim'].value:.3f} | {found['dino_l1'].value:.3f} | 3 | exact |"
    assert release_windows.table_row(pooled, "exact").endswith(row)
    assert jax.tree.leaves(table.to_json())


def test_every_handle_that_cannot_be_used_is_named(root, tmp_path):
    file = write(
        tmp_path / "h.json",
        h5=[handle(5), handle(5, traj=99), handle(5, frame=66), handle(5, traj="x")],
    )
    with pytest.raises(
        ValueError, match="1 handles cannot be used:\n  horizon 5, handle 3: traj_id: expected a number"
    ):
        release_windows.read_handles(file)
    file = write(tmp_path / "h.json", h5=[handle(5), handle(5, traj=99), handle(5, frame=66)])
    with pytest.raises(ValueError) as error:
        chosen(file, config(root))
    assert "2 handles cannot be used" in str(error.value)
    assert "handle 1: maniskill/panda_28px:PullCube_v2_success, trajectory 99: expected among" in str(error.value)
    assert "trajectory 3: expected a frame 70, found 70 frames" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (handle(5, sampled_horizon=15), "sampled_horizon: expected 5, as its list says, found 15"),
        (handle(5, frame=-1), "frame_id: expected a frame's number, found -1"),
        (handle(5, frame=True), "frame_id: expected a frame's number, found True"),
        ({"traj_id": 1}, "found no dataset_root, frame_id, sampled_horizon"),
        ("handle", "expected an object, found str"),
    ],
)
def test_a_handle_that_is_not_whole_is_named(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        release_windows.read_handles(write(tmp_path / "h.json", h5=[entry]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"handles_by_horizon": {"five": []}}', '{"handles_by_horizon": []}'])
def test_a_file_that_holds_no_handles_is_one_line(tmp_path, text):
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(ValueError, match=r"h\.json: expected") as error:
        release_windows.read_handles(tmp_path / "h.json")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="--handles: expected"):
        release_windows.read_handles(tmp_path / "gone.json")


def test_a_dataset_that_is_not_built_says_how_to_build_it(root, tmp_path):
    file = write(tmp_path / "h.json", h5=[handle(5, dataset_root=f"{AUTHORS}/ppo/ur10e/PushT-v2/fail")])
    with pytest.raises(FileNotFoundError, match=r"python -m data\.build maniskill"):
        chosen(file, config(root))


def test_horizons_and_counts_are_chosen_and_absent_ones_refused(tmp_path):
    file = write(tmp_path / "h.json", h5=[handle(5), handle(5, frame=9)], h15=[handle(15)])
    found = release_windows.read_handles(file)
    assert {h: len(v) for h, v in release_windows.select(found, file, horizons=(5,), count=1).items()} == {5: 1}
    with pytest.raises(ValueError, match=r"--horizons: expected horizons of .* \(5, 15\), found 60"):
        release_windows.select(found, file, horizons=(60,), count=None)
