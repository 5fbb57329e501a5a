"""The release's IWS layout: one dataset per task, 2-D target rows as they are, frames that are not square."""

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from data.datasets import Datasets  # noqa: E402
from data.iws import builder as iws  # noqa: E402
from data.pipeline import WindowBatches, WindowLoader  # noqa: E402
from data.schema import EpisodeError, from_example  # noqa: E402
from data.tokens import TokenCache  # noqa: E402
from tests.data.release_tree import (  # noqa: E402
    assert_windows_aligned,
    build,
    episodes_of,
    loader,
    read_code,
    targets,
    unmasked,
    write_index,
    write_trajectory,
)

SIZE = (48, 64)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    source = tmp_path_factory.mktemp("iws_converted")
    for task, width in (("pusht", 4), ("bimanual_box", 14)):
        for index, length in enumerate([10, 12, 9, 11]):
            folder = source / task / f"traj_{index:06d}"
            rows = targets(index, length, width)
            camera = {"camera": "camera_0", "size": SIZE, "num_objects": 0, "success": None}
            write_trajectory(folder, index, length, target_rows=rows, masks_missing=index == 3, **camera)
        write_index(source / task, "panda")
    (source / "summary.json").write_text("{}")
    return source


def test_each_task_becomes_a_dataset_of_its_own_width_with_aligned_windows(tree, tmp_path):
    layouts = iws.layouts(tree, 40)
    assert {layout.name: layout.spec.action_dim for layout in layouts} == {"pusht": 4, "bimanual_box": 14}
    for layout in layouts:
        built = build(iws.IWSBuilder, layout, tmp_path)
        assert_windows_aligned(loader(tmp_path, f"iws/{layout.name}_40px:episodes"), masks=True)
        examples = episodes_of(built, "episodes")
        assert [len(example["frames"]) for example in examples] == [10, 12, 9, 10]
        episode = from_example(examples[0])
        assert episode.frames.shape == (10, 40, 40, 3) and episode.object_positions is None
        np.testing.assert_array_equal(episode.actions, targets(0, 10, layout.spec.action_dim))
        assert not episode.success and episode.robot_id == 0


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    [layout] = iws.layouts(tree / "pusht", 40)
    build(iws.IWSBuilder, layout, root)
    return root


TASK = "iws/pusht_40px:episodes"


def test_last_action_adds_the_row_issued_at_the_last_frame(built):
    plain, more = (WindowBatches(unmasked(loader(built, TASK, last_action=last)))[0] for last in (False, True))
    rows = np.arange(plain["actions"].shape[1])
    for name in ("frames", "horizon", "window_id"):  # the same windows
        np.testing.assert_array_equal(plain[name], more[name])
    np.testing.assert_array_equal(plain["num_actions"], plain["horizon"] - 1)
    np.testing.assert_array_equal(more["num_actions"], plain["horizon"])
    for pair, given, horizon in zip(more["frames"], more["actions"], more["horizon"], strict=True):
        (label, first), (_, last) = map(read_code, pair)
        np.testing.assert_array_equal(given[:horizon, 0], np.arange(first, last + 1))
        assert (given[:horizon, 1] == label).all() and not given[horizon:].any()
    kept = rows < plain["num_actions"][:, None]
    np.testing.assert_array_equal(plain["actions"][kept], more["actions"][kept])


def test_with_last_action_the_longest_window_fills_every_row_at_any_stride(built):
    longest = {"min_horizon": 3, "max_horizon": 3, "stride": 2}
    batch = WindowBatches(unmasked(loader(built, TASK, last_action=True, **longest)))[0]
    assert batch["actions"].shape[1] == 3 and (batch["num_actions"] == 3).all()
    for pair, given in zip(batch["frames"], batch["actions"], strict=True):
        (_, first), (_, last) = map(read_code, pair)
        assert given[:, 0].tolist() == [first, first + 2, last] and last == first + 4


def test_mask_top_blackens_the_top_rows_of_every_mask_and_nothing_else(built):
    whole, cut = (WindowBatches(loader(built, TASK, mask_top=share))[0] for share in (0.0, 0.26))
    assert whole["frames"][:, :, :10].any() and not cut["frames"][:, :, :10].any()  # int(40 x 0.26) rows
    np.testing.assert_array_equal(whole["frames"][:, :, 10:], cut["frames"][:, :, 10:])
    for name in whole.keys() - {"frames"}:
        np.testing.assert_array_equal(whole[name], cut[name])
    windows = loader(built, TASK, mask_top=0.5)
    assert not windows.load_window(windows.validation_windows(5, 1)[0])["frames"][:, :20].any()


def test_tokens_under_a_mask_top_have_a_separate_cache(built, tmp_path):
    encoded = []

    def encode(frames):
        encoded.append(frames)
        return frames.reshape(len(frames), 1, -1)[..., :8].astype(np.float32)

    caches = {}
    for share in (0.0, 0.26):
        datasets = Datasets(built, [TASK], mask_top=share)
        datasets.compute_tokens(tmp_path, "f" * 16, lambda: encode, backbone="fake")
        caches[share] = datasets.caches[TASK].directory
    whole, cut = np.split(np.concatenate(encoded), 2)
    assert whole[:, :10].any() and not cut[:, :10].any() and caches[0.0] != caches[0.26]
    with pytest.raises(ValueError, match=r"expected 0\.26, found None; these are tokens of other data"):
        TokenCache(caches[0.0], datasets.stores[TASK], "f" * 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_top": 1.0}, r"data\.mask_top: expected a share in \[0, 1\), found 1\.0"),
        ({"mask_top": -0.5}, "expected a share"),
        (
            {"mask_top": 0.25, "source": "tokens"},
            "with data.source='tokens', whose features are computed with whole masks",
        ),
    ],
)
def test_an_impossible_mask_top_is_one_line(built, settings, message):
    config = loader(built, TASK, **settings | {"mask_top": 0.0, "source": "frames"}).config
    config.update(settings)
    with pytest.raises(ValueError, match=message):
        WindowLoader(config, fingerprint="f" * 16)


def test_a_mask_top_without_masks_is_one_line(make_config):
    with pytest.raises(ValueError, match=r"expected 0 for datasets without masks, found 0\.25"):
        WindowLoader(make_config(mask_top=0.25))


def test_one_task_may_be_named_and_a_missing_camera_is_said(tree):
    [layout] = iws.layouts(tree / "pusht", 40)
    assert layout.name == "pusht"
    [layout] = iws.layouts(tree / "pusht", 40, camera="camera_1")
    with pytest.raises(
        EpisodeError, match="camera_1_rgb: expected a video or image folder, found cameras camera_0; see"
    ):
        layout.read(layout.recordings()[0])
