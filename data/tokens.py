"""Token cache: the frozen backbone's features of every frame of a split, computed once and stored as bf16 records.

One ArrayRecord entry is one frame, raw bf16 [L, C], uncompressed and ungrouped for random access; entry i is frame i
of the split (`EpisodeStore.frame_index`). `meta.json` records the data and backbone of the tokens, and whether they are
complete; it is replaced atomically after every shard, so a killed build resumes where it stopped. Files are checked by
size when opened, and every record by the container's hash when read.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, UInt8
from tqdm import tqdm

from data.episodes import EpisodeStore

FORMAT = 1
META = "meta.json"
DTYPE = ml_dtypes.bfloat16
SHARD_BYTES = 256 * 2**20

EncodeFn = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[Any, "n l c"]]


def token_cache_dir(root: str | Path, store: EpisodeStore, fingerprint: str) -> Path:
    """Where the tokens of a split and a backbone belong under `root`."""
    height, width = store.image_size
    name = store.reference.replace("/", "-").replace(":", "-")
    masks = f"-mask_top{store.mask_top:g}" if store.mask_top else ""
    return Path(root) / f"{name}-{height}x{width}{masks}-{fingerprint}"


def is_complete(directory: Path) -> bool:
    """Whether a folder holds a complete token cache; `TokenCache` checks which data it is for."""
    return (directory / META).exists() and bool(_read_meta(directory).get("complete"))


def _identity(store: EpisodeStore, fingerprint: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dataset": store.reference,
        "version": store.version,
        "dataset_digest": store.digest,
        "image_size": list(store.image_size),
        "frames": store.num_frames,
        "masked": store.has_masks,
        "dtype": np.dtype(DTYPE).name,
        # caches older than this setting used whole masks
        **({"mask_top": store.mask_top} if store.mask_top else {}),
    }


def _check_identity(meta: dict[str, Any], expected: dict[str, Any], directory: Path) -> None:
    for key, value in expected.items():
        if meta.get(key) != value:
            raise ValueError(
                f"token cache {directory}: {key}: expected {value!r}, found {meta.get(key)!r}; "
                f"these are tokens of other data or another backbone: delete the folder or choose another"
            )


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / META).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"token cache {directory}: {META}: expected JSON, found {error}; delete the folder and rebuild it"
        ) from None


def _write_meta(directory: Path, meta: dict[str, Any]) -> None:
    partial = directory / f".{META}.partial"
    partial.write_text(json.dumps(meta, indent=1))
    partial.replace(directory / META)


class TokenCache:
    """Read access to the tokens of every frame of a split.

    Opening checks that the cache is complete and was made by this backbone from exactly this data, and checks the size
    of every file: FileNotFoundError or ValueError in one line otherwise.
    """

    def __init__(self, directory: str | Path, store: EpisodeStore, fingerprint: str) -> None:
        self.directory = Path(directory)
        if not (self.directory / META).exists():
            raise FileNotFoundError(
                f"token cache {self.directory}: expected {META}, found none; build it first, or set data.source=frames"
            )
        self.meta = _read_meta(self.directory)
        _check_identity(self.meta, _identity(store, fingerprint), self.directory)
        if not self.meta["complete"]:
            done = sum(shard["frames"] for shard in self.meta["shards"])
            raise ValueError(
                f"token cache {self.directory}: expected {self.meta['frames']} frames, found {done}; "
                f"its build was interrupted: run it again to resume"
            )
        self.shape: tuple[int, int] = tuple(self.meta["token_shape"])
        files = [self.directory / shard["file"] for shard in self.meta["shards"]]
        for file, shard in zip(files, self.meta["shards"], strict=True):
            _check_file(file, shard["bytes"])
        self._records = ArrayRecordDataSource([str(file) for file in files])

    def __len__(self) -> int:
        return self.meta["frames"]

    def __getitem__(self, frame: int) -> Float[np.ndarray, "l c"]:
        return self.read([frame])[0]

    def read(self, frames: Sequence[int]) -> Float[np.ndarray, "n l c"]:
        """Tokens (bf16) of frames numbered within the split, in the order given."""
        out = np.empty((len(frames), *self.shape), DTYPE)
        try:
            for row, record in zip(out, self._records.__getitems__(list(map(int, frames))), strict=True):
                row[...] = np.frombuffer(record, DTYPE).reshape(self.shape)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"token cache {self.directory}: expected intact records for frames {min(frames)}..{max(frames)}, "
                f"found: {reason}; delete the damaged file's folder and rebuild it"
            ) from None
        return out


def _check_file(file: Path, size: int) -> None:
    actual = file.stat().st_size if file.exists() else None
    if actual != size:
        raise ValueError(
            f"token cache file {file}: expected {size} bytes, found {'no file' if actual is None else actual}; "
            f"delete its folder and rebuild it"
        )


class _FrameBatches:
    """Frames first..last-1 of a split in fixed batches: random access to (frames, number of valid ones)."""

    def __init__(self, store: EpisodeStore, first: int, last: int, size: int) -> None:
        self.store, self.first, self.last, self.size = store, first, last, size

    def __len__(self) -> int:
        return math.ceil((self.last - self.first) / self.size)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        begin = self.first + i * self.size
        end = min(begin + self.size, self.last)
        out = np.zeros((self.size, *self.store.image_size, 3), np.uint8)
        offsets, position = self.store.offsets, begin
        while position < end:
            row = int(np.searchsorted(offsets, position, side="right")) - 1
            stop = min(end, int(offsets[row + 1]))
            out[position - begin : stop - begin] = self.store.frames(
                row, range(position - offsets[row], stop - offsets[row])
            )
            position = stop
        return out, end - begin

    def stream(self, num_threads: int) -> Iterable[tuple[np.ndarray, int]]:
        """The batches in order, decoded ahead in threads."""
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        return grain.MapDataset.source(self).to_iter_dataset(options)


def build_token_cache(
    store: EpisodeStore,
    encode_fn: EncodeFn,
    *,
    backbone: str,
    fingerprint: str,
    out_dir: str | Path,
    batch_size: int = 32,
    shard_bytes: int = SHARD_BYTES,
    num_threads: int = 2,
) -> TokenCache:
    """Compute and store the tokens of every frame of a split, or finish an interrupted build, and open the result.

    `encode_fn` maps uint8 [batch_size, H, W, 3] (background already zero where the dataset has masks; the last batch
    is padded with black frames) to tokens [batch_size, L, C]. Refuses a folder made from other data or another
    backbone.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    identity = _identity(store, fingerprint) | {"batch_size": batch_size}
    if (directory / META).exists():
        meta = _read_meta(directory)
        _check_identity(meta, identity if not meta["complete"] else _identity(store, fingerprint), directory)
    else:
        length, width = np.shape(encode_fn(np.zeros((batch_size, *store.image_size, 3), np.uint8)))[1:]
        per_shard = max(1, shard_bytes // (length * width * np.dtype(DTYPE).itemsize * batch_size)) * batch_size
        meta = identity | {"backbone": backbone, "token_shape": [length, width], "frames_per_shard": per_shard}
        meta |= {"shards": [], "complete": False}
        _write_meta(directory, meta)
    if not meta["complete"]:
        _build_shards(store, encode_fn, meta, directory, num_threads)
    return TokenCache(directory, store, fingerprint)


def _build_shards(
    store: EpisodeStore, encode_fn: EncodeFn, meta: dict[str, Any], directory: Path, num_threads: int
) -> None:
    total, per_shard = meta["frames"], meta["frames_per_shard"]
    done = sum(shard["frames"] for shard in meta["shards"])
    interval = 1.0 if sys.stderr.isatty() else 30.0  # log files get an occasional line, not a bar
    with tqdm(total=total, initial=done, unit="frame", desc=f"tokens {store.reference}", mininterval=interval) as bar:
        for first in range(done, total, per_shard):
            batches = _FrameBatches(store, first, min(first + per_shard, total), meta["batch_size"])
            meta["shards"].append(_build_shard(batches.stream(num_threads), encode_fn, meta, directory, bar))
            _write_meta(directory, meta)
    shards = meta["shards"]
    meta["max_error"] = max(shard["max_error"] for shard in shards)
    meta["mean_error"] = sum(shard["mean_error"] * shard["frames"] for shard in shards) / total
    meta["complete"] = True
    _write_meta(directory, meta)


def _build_shard(
    batches: Iterable[tuple[np.ndarray, int]], encode_fn: EncodeFn, meta: dict[str, Any], directory: Path, bar: tqdm
) -> dict[str, Any]:
    """Write one shard under a temporary name, rename it, and return its entry for meta.json."""
    file = directory / f"tokens-{len(meta['shards']):05d}.array_record"
    partial = directory / f".{file.name}.partial"
    shape = tuple(meta["token_shape"])
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    max_error, error_sum, count = 0.0, 0.0, 0
    for frames, valid in batches:
        tokens = np.asarray(encode_fn(frames))[:valid]
        if tokens.shape[1:] != shape or not np.isfinite(tokens.astype(np.float32)).all():
            writer.close()
            raise ValueError(
                f"token cache {directory}: expected finite tokens {list(shape)} per frame, found "
                f"{list(tokens.shape[1:])} or non-finite values in {file.name}; check the backbone"
            )
        stored = tokens.astype(DTYPE)
        error = np.abs(stored.astype(np.float32) - tokens.astype(np.float32))
        max_error, error_sum = max(max_error, float(error.max())), error_sum + float(error.mean()) * valid
        for record in stored:
            writer.write(record.tobytes())
        count += valid
        bar.update(valid)
    writer.close()
    partial.replace(file)
    return {
        "file": file.name,
        "frames": count,
        "bytes": file.stat().st_size,
        "max_error": max_error,
        "mean_error": error_sum / count,
    }
