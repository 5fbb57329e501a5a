"""The pipeline: frames, actions and tokens aligned, draws fixed by (seed, index), exact resume, clear refusals."""

import hashlib
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import episodes
from data.episodes import EpisodeStore, _add
from data.pipeline import NEWER, TrainIterator, WindowBatches, WindowLoader, action_limits, batch_spec
from data.tokens import build_token_cache, token_cache_dir
from data.windows import Window

FINGERPRINT = "f" * 64


def encode(frames: np.ndarray) -> np.ndarray:
    """Tokens [n, 2, 3] holding the frame's label (small integers, exact in bf16)."""
    return frames[:, 0, 0, None].repeat(2, axis=1).astype(np.float32)


@pytest.fixture
def token_config(make_config):
    """A configuration reading tokens, its caches built."""
    config = make_config(source="tokens")
    for store in WindowLoader(make_config()).stores.values():
        out = token_cache_dir(config.token_root, store, FINGERPRINT)
        build_token_cache(store, encode, backbone="fake", fingerprint=FINGERPRINT, out_dir=out, batch_size=16)
    return config


def make_train_iterator(
    config, process_index=0, process_count=1, *, split="train", fingerprint=None, with_frames=False
) -> TrainIterator:
    loader = WindowLoader(config, fingerprint=fingerprint, with_frames=with_frames)
    return TrainIterator(WindowBatches(loader, split, process_index, process_count), split)


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def assert_equal(left: list, right: list) -> None:
    """Batches are equal bit for bit."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def assert_aligned(labels: np.ndarray, batch: dict, stride: int = 1) -> None:
    """Labels (episode, frame) [b,2,2] of first and last frame against the action rows, which carry theirs."""
    for i, h in enumerate(batch["horizon"]):
        (episode, first), (same, last) = labels[i].astype(int)
        rows = batch["actions"][i]
        assert same == episode
        assert last == first + (h - 1) * stride
        assert batch["num_actions"][i] == h - 1
        np.testing.assert_array_equal(rows[: h - 1, 0], episode)
        np.testing.assert_array_equal(rows[: h - 1, 1], first + stride * np.arange(h - 1))
        np.testing.assert_array_equal(rows[h - 1 :], 0)
        assert batch["robot_id"][i] == episode % 2


@pytest.mark.parametrize(("source", "with_frames"), [("frames", False), ("tokens", False), ("tokens", True)])
def test_batches_are_what_their_spec_says(make_config, token_config, source, with_frames):
    config = token_config if source == "tokens" else make_config()
    loader = WindowLoader(config, fingerprint=FINGERPRINT, with_frames=with_frames)
    batch = next(TrainIterator(WindowBatches(loader, "train"), "train"))
    frame_shape, token_shape = (8, 8, 3), (2, 3)
    spec = batch_spec(
        config,
        8,
        action_dim=2,
        frame_shape=frame_shape if source == "frames" or with_frames else None,
        token_shape=token_shape if source == "tokens" else None,
    )
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec == loader.spec(8)


@pytest.mark.parametrize("stride", [1, 2])
def test_actions_are_those_that_move_the_first_frame_to_the_last(make_config, stride):
    config = make_config(stride=stride)
    batches = take(make_train_iterator(config), 30)
    for batch in batches:
        assert_aligned(batch["frames"][:, :, 0, 0, :2], batch, stride)
        assert batch["frames"].shape == (8, 2, 8, 8, 3)
        assert batch["actions"].shape == (8, config.max_horizon, 2)
    dtypes = {key: str(value.dtype) for key, value in batches[0].items()}
    assert dtypes == {
        "frames": "uint8",
        "actions": "float32",
        "num_actions": "int32",
        "robot_id": "int32",
        "horizon": "int32",
        "window_id": "int64",
    }
    assert len({int(h) for batch in batches for h in batch["horizon"]}) >= 12
    np.testing.assert_array_equal(np.concatenate([b["window_id"] for b in batches]), np.arange(30 * 8))


def test_tokens_are_those_of_the_frames_and_frames_are_read_only_if_requested(token_config):
    loader = WindowLoader(token_config, fingerprint=FINGERPRINT, with_frames=True)
    lean = take(make_train_iterator(token_config, fingerprint=FINGERPRINT), 20)
    for k, batch in enumerate(lean):
        full = WindowBatches(loader)[k]
        assert "frames" not in batch
        assert str(batch["tokens"].dtype) == "bfloat16"
        expected = encode(full["frames"].reshape(-1, 8, 8, 3)).reshape(8, 2, 2, 3)
        np.testing.assert_array_equal(batch["tokens"].astype(np.float32), expected)
        assert_aligned(expected[:, :, 0, :2], batch)
        assert_equal([{key: full[key] for key in batch}], [batch])
    assert {0, 1} == {int(v) for b in lean for v in b["tokens"][:, 0, 0, 2]}, "both datasets are drawn"


def test_draws_are_the_same_from_frames_and_from_tokens(make_config, token_config):
    from_frames = take(make_train_iterator(make_config()), 5)
    from_tokens = take(make_train_iterator(token_config, fingerprint=FINGERPRINT), 5)
    shared = [{key: b[key] for key in b if key != "tokens"} for b in from_tokens]
    assert_equal([{key: b[key] for key in b if key != "frames"} for b in from_frames], shared)


def test_training_never_sees_a_validation_episode_nor_validation_a_training_one(make_config):
    for split, expected in (("train", {2, 3, 4, 5, 6, 7}), ("validation", {0, 1})):
        batches = take(make_train_iterator(make_config(), split=split), 30)
        assert {int(e) for b in batches for e in b["frames"][:, 0, 0, 0, 0]} == expected


def test_starts_are_biased_towards_where_the_object_moves(make_config):
    interaction = make_config().interaction.to_dict() | {"prob": 1.0}
    batches = take(make_train_iterator(make_config(interaction=interaction)), 20)
    assert {int(t) for b in batches for t in b["frames"][:, 0, 0, 0, 1]} == {2, 3, 4, 5, 6, 7, 8}
    far = interaction | {"distance": 1e-9}
    batches = take(make_train_iterator(make_config(interaction=far)), 20)
    assert {int(t) for b in batches for t in b["frames"][:, 0, 0, 0, 1]} > set(range(20))


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(make_config, processes):
    whole = take(make_train_iterator(make_config()), 6)
    parts = [take(make_train_iterator(make_config(), p, processes), 6) for p in range(processes)]
    joined = [{key: np.concatenate([part[k][key] for part in parts]) for key in whole[k]} for k in range(6)]
    assert_equal(whole, joined)


def test_batches_do_not_depend_on_threads_and_depend_on_the_seed(make_config):
    one = take(make_train_iterator(make_config(num_threads=1, prefetch=1)), 12)
    assert_equal(one, take(make_train_iterator(make_config(num_threads=0)), 12))
    assert_equal(one, take(make_train_iterator(make_config(num_threads=4, prefetch=9)), 12))
    other = take(make_train_iterator(make_config(seed=1)), 12)
    assert not all(np.array_equal(a["horizon"], b["horizon"]) for a, b in zip(one, other, strict=True))


def test_resuming_continues_bit_for_bit(make_config):
    config = make_config()
    unbroken = take(make_train_iterator(config), 12)
    iterator = make_train_iterator(config)
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 7)
    resumed = make_train_iterator(config)
    take(resumed, 2)
    resumed.set_state(state)
    assert_equal(take(resumed, 7), expected)
    assert_equal(expected, unbroken[5:])


def test_a_position_is_valid_on_another_number_of_processes(make_config):
    config = make_config()
    iterator = make_train_iterator(config)
    take(iterator, 3)
    halves = [make_train_iterator(config, p, 2) for p in range(2)]
    for half in halves:
        half.set_state(iterator.get_state())
    left, right = (next(half) for half in halves)
    assert_equal([{key: np.concatenate([left[key], right[key]]) for key in left}], [next(iterator)])


def test_worker_processes_give_the_same_batches_and_a_position_is_valid_on_any_number_of_them(make_config):
    threads, workers = make_config(), make_config(num_workers=2)
    expected = take(make_train_iterator(threads), 9)
    iterator = make_train_iterator(workers)
    assert_equal(take(iterator, 5), expected[:5])
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(take(iterator, 4), expected[5:])
    for config in (workers, threads):
        resumed = make_train_iterator(config)
        resumed.set_state(state)
        assert_equal(take(resumed, 4), expected[5:])


def test_positions_of_older_versions_are_understood_or_refused(make_config):
    iterator = make_train_iterator(make_config())
    expected = take(iterator, 5)[3:]
    older = {key: value for key, value in iterator.get_state().items() if key != "batches"}
    iterator.set_state(older | {"num_workers": 0, "grain": {"next_index": 3}})
    assert_equal(take(iterator, 2), expected)
    with pytest.raises(ValueError, match=r"found worker processes' positions .* finish that run") as error:
        iterator.set_state(older | {"num_workers": 2, "grain": {"workers_state": {}}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "data.seed: expected 0 as when saved, found 3"),
        ({"batch_size": 4}, "data.batch_size: expected 8 as when saved, found 4"),
        ({"horizon_sampling": "uniform"}, "data.horizon_sampling: expected 'beta' as when saved, found 'uniform'"),
        ({"datasets": ("first:play",)}, "data.groups: expected"),
        ({"last_action": True}, "data.last_action: expected False as when saved, found True"),
    ],
)
def test_a_position_in_other_draws_is_refused(make_config, change, message):
    state = make_train_iterator(make_config()).get_state()
    with pytest.raises(ValueError, match=message):
        make_train_iterator(make_config(**change)).set_state(state)


def test_a_position_among_other_masks_or_from_frames_for_tokens_is_refused(make_config, token_config):
    masked = {"datasets": ("masked:play",)}
    state = make_train_iterator(make_config(**masked)).get_state()
    with pytest.raises(ValueError, match=r"data\.mask_top: expected 0\.0 as when saved, found 0\.5"):
        make_train_iterator(make_config(**masked, mask_top=0.5)).set_state(state)
    state = make_train_iterator(make_config()).get_state()
    with pytest.raises(ValueError, match=r"data\.source: expected 'frames' as when saved, found 'tokens'"):
        make_train_iterator(token_config, fingerprint=FINGERPRINT).set_state(state)


def test_a_position_from_before_masks_and_source_were_compared_goes_on(make_config):
    iterator = make_train_iterator(make_config())
    older = {key: value for key, value in iterator.get_state().items() if key not in NEWER}
    iterator.set_state(older | {"batches": 3})
    assert iterator.get_state()["batches"] == 3


def test_the_background_of_frames_is_zero_where_the_dataset_has_masks(make_config):
    batch = next(make_train_iterator(make_config(("masked:play",))))
    assert (batch["frames"][:, :, :4, :, 0] > 1).all()
    assert not batch["frames"][:, :, 4:].any()


def test_a_window_holds_every_frame_between_and_its_actions(token_config):
    loader = WindowLoader(token_config, fingerprint=FINGERPRINT, with_frames=True)
    row = int(np.flatnonzero(loader.stores["second:play"].episode_ids == 3)[0])
    full = loader.load_window(Window(0, 1, row, 10, 20))
    np.testing.assert_array_equal(full["frames"][:, 0, 0, 1], np.arange(10, 30))
    np.testing.assert_array_equal(full["tokens"][:, 0].astype(int), [[3, t, 1] for t in range(10, 30)])
    np.testing.assert_array_equal(full["actions"], [[3, t] for t in range(10, 29)])
    assert (full["horizon"], full["num_actions"], full["robot_id"]) == (20, 19, 1)
    some = loader.load_window(Window(0, 1, row, 10, 20), positions=(0, 9, 19))
    np.testing.assert_array_equal(some["frames"], full["frames"][[0, 9, 19]])
    np.testing.assert_array_equal(some["tokens"], full["tokens"][[0, 9, 19]])


def test_validation_windows_lie_in_held_out_episodes_and_load_whole(make_config):
    loader = WindowLoader(make_config())
    windows = loader.validation_windows(5, 11)
    assert {int(loader.store_of(w).episode_ids[w.episode]) for w in windows} == {0, 1}
    for window in windows:
        loaded = loader.load_window(window)
        np.testing.assert_array_equal(loaded["frames"][:, 0, 0, 1], window.start + np.arange(5))
        np.testing.assert_array_equal(loaded["actions"][:, 1], window.start + np.arange(4))


def test_action_limits_are_those_of_effective_training_actions(make_config):
    low, high = action_limits(WindowLoader(make_config()))
    np.testing.assert_array_equal(low, [2, 0])
    np.testing.assert_array_equal(high, [7, 38])  # episode 3 has 40 frames; the action after its last one has no effect
    assert low.dtype == high.dtype == np.float32


def test_the_index_is_computed_once_and_again_when_stale_or_damaged(labelled_root, monkeypatch):
    path = EpisodeStore(labelled_root, "first:play").directory / "index-play.npz"
    builds = []
    original = EpisodeStore._build_index
    monkeypatch.setattr(EpisodeStore, "_build_index", lambda self: builds.append(1) or original(self))
    first = EpisodeStore(labelled_root, "first:play")
    assert not builds
    path.write_bytes(path.read_bytes()[:100])
    assert EpisodeStore(labelled_root, "first:play").digest == first.digest
    assert len(builds) == 1
    (record_file,) = path.parent.glob("*.array_record*")
    record_file.touch()
    assert EpisodeStore(labelled_root, "first:play").digest == first.digest
    assert len(builds) == 2
    assert EpisodeStore(labelled_root, "second:play").digest != first.digest
    assert [p.name for p in path.parent.glob(".*")] == []


def test_a_read_only_dataset_folder_keeps_the_index_in_memory(labelled_root, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    (EpisodeStore(labelled_root, "second:play").directory / "index-play.npz").unlink()
    monkeypatch.setattr(episodes.np, "savez", refuse)
    store = EpisodeStore(labelled_root, "second:play")
    assert len(store) == 8
    assert not (store.directory / "index-play.npz").exists()


def test_a_pickled_store_reads_the_same(labelled_root):
    store = EpisodeStore(labelled_root, "first:play")
    frames = store.frames(4, [0, 3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).frames(4, [0, 3]), frames)
    np.testing.assert_array_equal(store.episode(4).frames[[0, 3]], frames)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("first", ValueError, "dataset reference: expected 'name:split'"),
        (
            "absent:play",
            FileNotFoundError,
            r"dataset 'absent': expected a built dataset .* python -m data\.build absent",
        ),
        ("first:demo", ValueError, "dataset 'first': expected a split 'demo', found play"),
    ],
)
def test_wrong_dataset_references_are_refused_in_one_line(labelled_root, reference, error, message):
    with pytest.raises(error, match=message) as caught:
        EpisodeStore(labelled_root, reference)
    assert "\n" not in str(caught.value)


def test_two_builds_under_one_name_are_refused_and_either_can_be_named(labelled_root, tmp_path):
    for version in ("1.0.0", "2.0.0"):
        shutil.copytree(labelled_root / "first" / "labelled" / "1.0.0", tmp_path / "twice" / version)
    with pytest.raises(ValueError, match=r"expected one build .* found twice/1\.0\.0, twice/2\.0\.0; name one of them"):
        EpisodeStore(tmp_path, "twice:play")
    assert EpisodeStore(tmp_path, "twice/2.0.0:play").num_frames == 169


def test_builds_of_different_splits_live_side_by_side(labelled_root, tmp_path):
    for config, split in (("some", "play"), ("others", "demo")):
        build = tmp_path / "apart" / config / "1.0.0"
        shutil.copytree(labelled_root / "first" / "labelled" / "1.0.0", build)
        for file in build.glob("*-play.*"):
            file.rename(build / file.name.replace("-play.", f"-{split}."))
        info = build / "dataset_info.json"
        info.write_text(info.read_text().replace('"play"', f'"{split}"'))
    for config, split in (("some", "play"), ("others", "demo")):
        store = EpisodeStore(tmp_path, f"apart:{split}")
        assert store.directory == tmp_path / "apart" / config / "1.0.0"
        assert store.num_frames == 169
    with pytest.raises(ValueError, match="dataset 'apart': expected a split 'test', found demo, play"):
        EpisodeStore(tmp_path, "apart:test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"source": "token"}, r"data\.source: expected one of .* found 'token'"),
        ({"source": "tokens"}, "expected a backbone fingerprint with 'tokens', found none"),
        ({"datasets": ("first:play", "masked:play")}, "expected one has_masks in all datasets, found"),
        ({"val_episodes": 8}, "group 'play': expected in every dataset a trajectory"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make_config, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        make_train_iterator(make_config(**overrides))
    assert "\n" not in str(error.value)


def test_a_batch_that_the_processes_cannot_share_is_refused(make_config):
    with pytest.raises(ValueError, match=r"data\.batch_size: expected a multiple of the 3 processes, found 8"):
        make_train_iterator(make_config(), 0, 3)


def test_training_data_needs_no_tensorflow_torch_or_simulator(labelled_root):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from configs import base\n"
        "from data.pipeline import TrainIterator, WindowBatches, WindowLoader\n"
        "config = base.get_config().data; config.root = sys.argv[2]; config.val_episodes = 2\n"
        "config.groups = {'play': {'datasets': ('first:play',), 'weight': 1.0, 'min_start_frame': 0}}\n"
        "next(TrainIterator(WindowBatches(WindowLoader(config)), 'train'))\n"
        "print(sorted({'tensorflow', 'torch', 'gymnasium', 'pygame', 'data.pusht'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parents[2]), str(labelled_root)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_actions_of_robots_with_fewer_joints_are_padded_and_their_limits_kept_separate(make_config):
    loader = WindowLoader(make_config(("first:play", "wide:play")))
    batches = WindowBatches(loader, "train")
    actions = np.concatenate([batches[k]["actions"] for k in range(4)])
    assert actions.shape[-1] == 3
    valid = np.concatenate([np.arange(15) < n for k in range(4) for n in batches[k]["num_actions"][:, None]]).reshape(
        -1, 15
    )
    assert set(np.unique(actions[valid][:, 2])) == {0.0, 7.0}  # both datasets are drawn
    low, high = action_limits(loader)
    assert (low[2], high[2]) == (7.0, 7.0)  # a robot without the joint does not change its limits


def test_a_datasets_digest_depends_on_its_content_and_not_on_the_order_of_its_fields():
    def digest(example):
        hasher = hashlib.blake2b()
        _add(hasher, example)
        return hasher.hexdigest()

    frames = np.array([b"one", b"three"], object)
    example = {"frames": frames, "actions": np.ones((2, 3), np.float32), "text": b"push"}
    assert digest(example) == digest(dict(reversed(example.items())))
    for changed in (
        {"frames": np.array([b"onet", b"hree"], object)},
        {"actions": np.ones((3, 2), np.float32)},
        {"actions": np.array([[1, 1, 1], [1, 1, 2]], np.float32)},
        {"text": b"pull"},
    ):
        assert digest(example | changed) != digest(example)
