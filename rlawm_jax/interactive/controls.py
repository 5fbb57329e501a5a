"""What a person drives with: bounds of the action dimensions, how far a key goes, and which key moves what."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from data.description import Projection
from data.episodes import EpisodeStore

HORIZONTAL, VERTICAL, THIRD = ("ArrowRight", "ArrowLeft"), ("ArrowUp", "ArrowDown"), ("w", "s")
USUAL = 90  # percentile of the recorded moves that one key press makes


class ActionError(ValueError):
    """What was given is not an action row within the bounds; one line."""


@dataclass(frozen=True)
class Key:
    """A key that changes one action dimension, in the direction `sign`."""

    name: str
    dimension: int
    sign: int


@dataclass(frozen=True)
class Controls:
    """Bounds of every action dimension in raw units, the size of a key press, and the keys."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    press: tuple[float, ...]
    keys: tuple[Key, ...]

    def check(self, action: object) -> Float[np.ndarray, " a"]:
        """An action row from outside as an array; ActionError if it is not one within the bounds."""
        wide = len(self.low)
        # exactly these types: bool is an int too
        if not isinstance(action, list) or len(action) != wide or any(type(v) not in (int, float) for v in action):
            raise ActionError(f"action: expected a list of {wide} numbers, found {str(action)[:80]}")
        for i, (value, low, high) in enumerate(zip(action, self.low, self.high, strict=True)):
            if not low <= value <= high:  # also refuses NaN
                raise ActionError(
                    f"action: expected number {i + 1} within {low:g} and {high:g}, found {str(value)[:80]}"
                )
        return np.array(action, np.float32)


def controls(store: EpisodeStore, bounds: tuple[tuple[float, ...], tuple[float, ...]] | None) -> Controls:
    """The controls of a dataset's robot; without `bounds` (lowest, highest) those of its recorded actions.

    A press changes a dimension as much as the recordings usually do (their 90th percentile), against standing still:
    the row before where actions are targets, zero elsewhere. So the model is asked for what it has seen.
    """
    rows = [store.actions(row) for row in range(len(store))]
    if bounds is None:
        every = np.concatenate(rows)
        bounds = tuple(every.min(axis=0).tolist()), tuple(every.max(axis=0).tolist())
    targets = store.description.hold_still != "zeros"
    moves = np.abs(np.concatenate([np.diff(row, axis=0) if targets else row for row in rows]))
    press = tuple(np.percentile(moves, USUAL, axis=0).round(4).tolist())
    return Controls(*bounds, press, seen_keys(store.description.projection, len(press)))


def seen_keys(projection: Projection | None, dimensions: int) -> tuple[Key, ...]:
    """Arrow keys for the first two action dimensions, W and S for the third; sliders alone move any others.

    Where the dataset says how positions appear in the frame, and an action has a number for each coordinate, an arrow
    key moves the robot the way that it points in the picture. Elsewhere right and up are the positive directions.
    """
    ways: Float32[np.ndarray, "d 2"] = np.array([(1, 0), (0, -1), (0, -1)], np.float32)
    if projection is not None and projection.matrix.shape[1] == dimensions + 1:
        # how the picture of the origin moves, in frame widths and heights (y is down)
        ends = projection.place(1e-3 * np.concatenate([np.zeros((1, dimensions)), np.eye(dimensions)]))
        ways = np.nan_to_num(ends[1:] - ends[0])
    across = 0
    if dimensions > 1:
        size = np.abs(ways)
        across = int(size[1, 0] + size[0, 1] > size[0, 0] + size[1, 1])
    pairs = [(HORIZONTAL, across, ways[across, 0])]
    if dimensions > 1:
        pairs.append((VERTICAL, 1 - across, -ways[1 - across, 1]))
    if dimensions > 2:
        pairs.append((THIRD, 2, -ways[2, 1]))
    return tuple(
        Key(name, dimension, sign if way >= 0 else -sign)
        for names, dimension, way in pairs
        for name, sign in zip(names, (1, -1), strict=True)
    )
