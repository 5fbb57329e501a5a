"""Windows of recorded video on the device: tokens, actions, other actions to compare with, and which patches move."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from data.pipeline import Batch, WindowLoader
from data.windows import Window
from rlawm_jax.evaluation.chunking import ChunkSpan
from rlawm_jax.evaluation.results import ANOTHERS, STILL
from rlawm_jax.imagination import Chunk


class WindowBatch(NamedTuple):
    """Windows of one horizon on the device: true tokens at the start and at every chunk's end, and the chunks' actions.

    `moving` marks the patches near the effector or an object at the start or the chunk's end (none if not known).
    `instead` holds, by row of the table, actions to predict with instead, and which windows have them. `images` is the
    true last frame in [0, 1], background black where there is a mask; None without image metrics.
    """

    start: Float[Array, "b l c"]
    truth: Float[Array, "n b l c"]
    moving: Bool[Array, "n b l"]
    chunks: Chunk
    instead: Mapping[str, tuple[Chunk, Bool[np.ndarray, " b"]]]
    robot_id: Int[Array, " b"]
    ids: Integer[Array, " b"]
    images: Float[Array, "b h w 3"] | None


def window_id(loader: WindowLoader, window: Window) -> int:
    """A number derived from the window alone, so that its noise is the same in any list, order or batch size."""
    store = loader.store_of(window)
    name = f"{store.reference}/{store.episode_ids[window.episode]}/{window.start}/{window.horizon}"
    return zlib.crc32(name.encode())


def read_windows(loader: WindowLoader, windows: Sequence[Window], positions: Sequence[int], reach: int) -> Batch:
    """Arrays of windows stacked along axis 1: frames at `positions`, action rows before position `reach`."""
    loaded = [loader.load_window(window._replace(horizon=reach), positions) for window in windows]
    arrays = [name for name in ("frames", "tokens", "actions") if name in loaded[0]]
    return {name: np.stack([window[name] for window in loaded], axis=1) for name in arrays}


def instead_of(
    loader: WindowLoader,
    windows: Sequence[Window],
    others: Sequence[Window | None],
    own: Float[np.ndarray, "t b a"],
    pieces: Sequence[ChunkSpan],
    longest: int,
) -> dict[str, tuple[Chunk, Bool[np.ndarray, " b"]]]:
    """The actions of `others`, and those that hold still; its own for a window that lacks them, which is marked so."""
    rows = len(own)
    still = [loader.hold_still(window) for window in windows]
    given = {
        ANOTHERS: [None if other is None else loader.actions(other, rows) for other in others],
        STILL: [None if row is None else np.tile(row, (rows, 1)) for row in still],
    }
    filled = {
        name: np.stack([own[:, i] if a is None else a for i, a in enumerate(actions)], axis=1)
        for name, actions in given.items()
    }
    return {
        name: (cut_actions(filled[name], pieces, longest), np.array([a is not None for a in actions]))
        for name, actions in given.items()
    }


def last_row(pieces: Sequence[ChunkSpan]) -> int:
    """How many action rows of a window the predictions read; some protocols read the row issued at the last frame."""
    return max(piece.first + piece.rows for piece in pieces)


def cut_actions(actions: Float[np.ndarray, "t b a"], pieces: Sequence[ChunkSpan], longest: int) -> Chunk:
    """The action rows of every chunk, zero-padded to a common length."""
    _, size, width = actions.shape
    rows = [piece.rows for piece in pieces]
    out = np.zeros((len(pieces), size, max(longest, *rows), width), np.float32)
    for chunk, piece in zip(out, pieces, strict=True):
        chunk[:, : piece.rows] = actions[piece.first : piece.first + piece.rows].swapaxes(0, 1)
    return Chunk(jnp.asarray(out), jnp.tile(jnp.array(rows, jnp.int32)[:, None], (1, size)))
