"""How the actions of a long window are split into predictions: exactly, or as in the release's evaluation."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

RELEASE_LONGEST = 15  # frames; up to this horizon the release predicts in one chunk
RELEASE_FRAMES = 10  # frames per chunk for longer horizons
RELEASE_ROWS = 15  # action rows per chunk in the release's IWS protocol


class ChunkSpan(NamedTuple):
    """One prediction: its action rows [first, first + rows), and the frame its result is compared with.

    Rows and frames count from the window's first frame, whose action is row 0.
    """

    first: int
    rows: int
    frame: int


Chunking = Callable[[int], list[ChunkSpan]]  # from a horizon in frames


def longest_chunk(config: ConfigDict) -> int:
    """Intervals of the longest prediction, `config.eval.chunk` - 1; ValueError if the model reads fewer action rows."""
    longest = config.data.max_horizon + 1 - config.data.last_action
    if config.eval.chunk > longest:
        raise ValueError(
            f"config.eval.chunk: expected at most {longest} frames (data.max_horizon rows of "
            f"actions are the most the model reads), found {config.eval.chunk}"
        )
    return config.eval.chunk - 1


def balanced_chunks(intervals: int, longest: int) -> list[int]:
    """Action rows per prediction: as few predictions as possible, with sizes that differ by at most one."""
    if intervals < 1 or longest < 1:
        raise ValueError(f"chunks: expected 1 or more intervals and rows per chunk, found {intervals} and {longest}")
    count = -(-intervals // longest)
    return [intervals // count + (i < intervals % count) for i in range(count)]


def exact(horizon: int, longest: int, *, last_action: bool = False) -> list[ChunkSpan]:
    """Every interval of the window once, in balanced chunks of at most `longest` intervals.

    `last_action`: the model was trained with the action issued at a window's last frame as an extra row, so every
    chunk ends with that row.
    """
    pieces, start = [], 0
    for rows in balanced_chunks(horizon - 1, longest):
        pieces.append(ChunkSpan(start, rows + last_action, start + rows))
        start += rows
    return pieces


def release(horizon: int) -> list[ChunkSpan]:
    """The release's ManiSkill protocol (METHOD.md 13.7): up to 15 frames at once, more in chunks of 10 frames.

    Each chunk loses its last row, so 30 frames are predicted with 27 of their 29 rows and compared with the 30th.
    """
    if horizon <= RELEASE_LONGEST:
        return [ChunkSpan(0, horizon - 1, horizon - 1)]
    if horizon % RELEASE_FRAMES:
        raise ValueError(
            f"horizon {horizon}: expected at most {RELEASE_LONGEST} frames or a multiple of {RELEASE_FRAMES} with the "
            "release's protocol; use --protocol=exact"
        )
    return [ChunkSpan(i, RELEASE_FRAMES - 1, i + RELEASE_FRAMES - 1) for i in range(0, horizon, RELEASE_FRAMES)]


def release_iws(horizon: int) -> list[ChunkSpan]:
    """The release's IWS protocol: chunks of 15 rows, none dropped; 60 frames are 60 rows for 59 intervals."""
    if horizon % RELEASE_ROWS:
        raise ValueError(
            f"horizon {horizon}: expected a multiple of {RELEASE_ROWS} frames with the release's IWS protocol; "
            "use --protocol=exact"
        )
    return [ChunkSpan(i, RELEASE_ROWS, i + RELEASE_ROWS - 1) for i in range(0, horizon, RELEASE_ROWS)]
