"""The token cache: right tokens for every frame, exact resume after a kill, refusal of tokens of other data."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from data.episodes import EpisodeStore
from data.tokens import TokenCache, build_token_cache, token_cache_dir

TOKENS, WIDTH = 4, 16
FRAME_BYTES = TOKENS * WIDTH * 2


def encode(frames: np.ndarray) -> np.ndarray:
    """Tokens that name the pixels: not exact in bf16, and different for every frame."""
    mean = frames.astype(np.float32).mean(axis=(1, 2))  # [n, 3]
    code = mean @ np.array([1.0, 0.013, 0.37], np.float32)
    return code[:, None, None] + np.arange(TOKENS * WIDTH, dtype=np.float32).reshape(TOKENS, WIDTH) / 7


def build(store: EpisodeStore, out_dir: Path, encode_fn=encode, fingerprint="f1", **kwargs) -> TokenCache:
    settings = {"backbone": "fake", "batch_size": 8, "shard_bytes": 40 * FRAME_BYTES} | kwargs
    return build_token_cache(store, encode_fn, fingerprint=fingerprint, out_dir=out_dir, **settings)


@pytest.fixture(scope="module")
def store(labelled_root) -> EpisodeStore:
    return EpisodeStore(labelled_root, "first:play")


@pytest.fixture
def cache(store, tmp_path) -> TokenCache:
    return build(store, tmp_path / "cache")


def test_every_frame_has_its_own_tokens_in_any_order(store, cache):
    assert len(cache) == store.num_frames
    for row in range(len(store)):
        length = int(store.lengths[row])
        expected = encode(store.frames(row, range(length))).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(cache.read(store.frame_index(row, np.arange(length)[::-1])), expected[::-1])
        np.testing.assert_array_equal(cache[int(store.frame_index(row, 3))], expected[3])


def test_background_is_black_for_the_backbone_where_there_are_masks(labelled_root, tmp_path):
    store = EpisodeStore(labelled_root, "masked:play")
    cache = build(store, tmp_path)
    frames, masks = store.recorded(2, [7])
    np.testing.assert_array_equal(
        cache[int(store.frame_index(2, 7))], encode(frames * masks[..., None])[0].astype(ml_dtypes.bfloat16)
    )
    assert not np.array_equal(cache[int(store.frame_index(2, 7))], encode(frames)[0].astype(ml_dtypes.bfloat16))


def test_shards_are_bounded_and_their_sizes_and_rounding_errors_recorded(store, cache):
    shards = cache.meta["shards"]
    assert [shard["frames"] for shard in shards] == [40] * 4 + [store.num_frames - 160]
    assert all((cache.directory / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
    exact = np.concatenate([encode(store.frames(row, range(n))) for row, n in enumerate(store.lengths)])
    error = np.abs(exact.astype(ml_dtypes.bfloat16).astype(np.float32) - exact)
    assert cache.meta["max_error"] == error.max() > 0
    # means of batches of means: float64 sums of float32 means, so a relative 1e-5
    assert cache.meta["mean_error"] == pytest.approx(error.mean(), rel=1e-5)


def test_batches_given_to_the_backbone_have_one_size_and_a_complete_cache_needs_none(store, tmp_path):
    shapes = []

    def counting(frames):
        shapes.append(frames.shape)
        return encode(frames)

    build(store, tmp_path, counting)
    assert set(shapes) == {(8, *store.image_size, 3)}
    shapes.clear()
    build(store, tmp_path, counting)
    assert not shapes


def test_a_killed_build_resumes_after_its_last_shard_and_gives_the_same_bytes(store, cache, tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path[:0] = sys.argv[1:3]
        from test_tokens import EpisodeStore, Path, build, encode
        calls = 0
        def dying(frames):
            global calls
            calls += 1
            if calls == 13:  # one call finds the shape; five per shard: in the third shard
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(frames)
        build(EpisodeStore(sys.argv[3], "first:play"), Path(sys.argv[4]), dying)
        """
    )
    out, root = tmp_path / "killed", store.directory.parents[2]
    arguments = [str(Path(__file__).parent), str(Path(__file__).parents[2]), str(root), str(out)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(ValueError, match=r"expected 169 frames, found 80; its build was interrupted: run it again"):
        TokenCache(out, store, "f1")

    encoded = []
    resumed = build(store, out, lambda frames: encoded.append(1) or encode(frames))
    assert len(encoded) == 5 + 5 + 2
    assert resumed.meta == cache.meta
    for shard in cache.meta["shards"]:
        assert (out / shard["file"]).read_bytes() == (cache.directory / shard["file"]).read_bytes()
    assert not list(out.glob(".*partial"))


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("reference", "fingerprint", "message"),
    [
        ("first:play", "other", "fingerprint: expected 'other', found 'f1'"),
        ("second:play", "f1", "dataset: expected 'second:play', found 'first:play'"),
    ],
)
def test_tokens_of_another_backbone_or_dataset_are_refused(
    labelled_root, cache, complete, reference, fingerprint, message
):
    meta = cache.directory / "meta.json"
    meta.write_text(json.dumps(cache.meta | {"complete": complete}))
    other = EpisodeStore(labelled_root, reference)
    for attempt in (
        lambda: TokenCache(cache.directory, other, fingerprint),
        lambda: build(other, cache.directory, fingerprint=fingerprint),
    ):
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
        assert str(cache.directory) in str(error.value)


def test_tokens_of_a_rebuilt_dataset_are_refused(store, cache):
    class Rebuilt(EpisodeStore):
        def __init__(self):
            self.__dict__.update(store.__dict__, digest="0" * 32)

    with pytest.raises(ValueError, match=r"dataset_digest: expected '0{32}', found"):
        TokenCache(cache.directory, Rebuilt(), "f1")


def test_a_truncated_shard_is_named_in_one_line(store, cache):
    file = cache.directory / cache.meta["shards"][2]["file"]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{file.name}: expected \d+ bytes, found 1000; delete") as error:
        TokenCache(cache.directory, store, "f1")
    assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="found no file"):
        TokenCache(cache.directory, store, "f1")


def test_a_flipped_bit_anywhere_in_a_record_is_an_error_and_never_a_wrong_token(store, cache):
    file = cache.directory / cache.meta["shards"][1]["file"]
    intact, record = file.read_bytes(), cache[50].tobytes()
    begin = intact.index(record)
    for offset in range(0, len(record), 17):
        damaged = bytearray(intact)
        damaged[begin + offset] ^= 1 << (offset % 8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"intact records for frames 50\.\.50, found") as error:
            TokenCache(cache.directory, store, "f1")[50]
        assert "\n" not in str(error.value)
    file.write_bytes(intact)
    assert TokenCache(cache.directory, store, "f1")[50].tobytes() == record


def test_missing_and_damaged_descriptions_are_named_in_one_line(store, cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected meta\.json, found none; build it first"):
        TokenCache(tmp_path / "nowhere", store, "f1")
    (cache.directory / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json: expected JSON, found .*; delete the folder"):
        TokenCache(cache.directory, store, "f1")


def test_a_backbone_that_returns_nan_or_another_shape_is_stopped(store, tmp_path):
    def nan_at_the_end(frames):
        return np.where(frames[:, :1, :1, 1] == 39, np.nan, encode(frames))

    with pytest.raises(ValueError, match=r"expected finite tokens \[4, 16\] per frame"):
        build(store, tmp_path / "nan", nan_at_the_end)
    sizes = iter([4, 4, 5])
    with pytest.raises(ValueError, match=r"expected finite tokens \[4, 16\] per frame, found \[5, 16\]"):
        build(store, tmp_path / "shape", lambda frames: np.zeros((8, next(sizes), 16)))


def test_backbones_and_image_sizes_have_separate_folders(store):
    one, two = token_cache_dir("t", store, "1a2b"), token_cache_dir("t", store, "3c4d")
    assert one == Path("t/first-play-8x8-1a2b")
    assert one != two
