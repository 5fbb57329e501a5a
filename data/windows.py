"""Choose the two frames that the model sees: the release's window sampling rule in plain numpy (METHOD.md 13.4, 13.5).

A window of horizon h spans h FRAMES, hence h-1 intervals and h-1 action rows; with stride 1 its frames are t and t+h-1.
The release reserves one frame at the end of every trajectory: a window of h frames needs h+1 frames from its start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

BETA = (5.0, 2.0)  # biased towards long horizons
HORIZON_SAMPLING = ("beta", "uniform")


@dataclass(frozen=True)
class WindowRule:
    """How windows are drawn; horizons count frames.

    `horizon_sampling` is "beta" (Beta(5,2), biased long) or "uniform". Trajectories of fewer than `min_num_frames`
    frames or without a valid start are dropped.
    """

    min_horizon: int = 2
    max_horizon: int = 15
    stride: int = 1
    horizon_sampling: str = "beta"
    interaction_prob: float = 0.0
    min_num_frames: int = 5

    def __post_init__(self) -> None:
        if not 2 <= self.min_horizon <= self.max_horizon:
            raise ValueError(
                f"min_horizon, max_horizon: expected 2 <= min <= max (they count frames), "
                f"found {self.min_horizon}, {self.max_horizon}"
            )
        if self.stride < 1:
            raise ValueError(f"stride: expected at least 1, found {self.stride}")
        if self.horizon_sampling not in HORIZON_SAMPLING:
            raise ValueError(f"horizon_sampling: expected one of {HORIZON_SAMPLING}, found {self.horizon_sampling!r}")
        if not 0.0 <= self.interaction_prob <= 1.0:
            raise ValueError(f"interaction_prob: expected a probability, found {self.interaction_prob}")


class Window(NamedTuple):
    """One draw: group, dataset within the group, episode (row of that dataset), first frame, horizon in frames."""

    group: int
    dataset: int
    episode: int
    start: int
    horizon: int


def valid_starts(num_frames: int, rule: WindowRule, min_start_frame: int = 0) -> int:
    """Number of valid starts min_start_frame, min_start_frame + 1, ... of a trajectory; 0 drops it."""
    if num_frames < rule.min_num_frames:
        return 0
    # the last 1 is the frame reserved at the end
    return max(0, num_frames - (min_start_frame + (rule.min_horizon - 1) * rule.stride + 1))


def feasible_horizon(num_frames: int, start: int, stride: int = 1) -> int:
    """Longest horizon (frames) that fits at `start`, with the last frame of the trajectory reserved."""
    return (max(0, num_frames - start - 1) - 1) // stride + 1


def sample_horizon(rng: np.random.Generator, upper: int, rule: WindowRule) -> int:
    """A horizon in [min_horizon, upper], drawn from the rule's distribution."""
    choices = upper - rule.min_horizon + 1
    if rule.horizon_sampling == "uniform":
        return rule.min_horizon + int(rng.integers(choices))
    # min: a draw that rounds to 1 would be one above the longest
    return min(rule.min_horizon + int(rng.beta(*BETA) * choices), upper)


def interacting_frames(
    effector: Float[np.ndarray, "t d"],
    objects: Float[np.ndarray, "t o d"],
    distance: float,
    movement: float,
    buffer: int,
) -> Int[np.ndarray, " n"]:
    """Frames at which an object near the effector moves, widened by `buffer` frames on both sides.

    `distance` (strictly below) and `movement` per frame (strictly above) are in the positions' length unit; the release
    uses 0.25 m, 0.002 m and 3 frames (METHOD.md 13.5).
    """
    close = np.linalg.norm(objects - effector[:, None], axis=-1) < distance
    moved = np.zeros_like(close)
    moved[1:] = np.linalg.norm(np.diff(objects, axis=0), axis=-1) > movement
    raw: Bool[np.ndarray, " t"] = (close & moved).any(axis=1)
    # cut from "full": "same" returns the kernel's length if the trajectory is shorter
    widened = np.convolve(raw, np.ones(2 * buffer + 1), mode="full")[buffer : buffer + len(raw)] > 0
    return np.flatnonzero(widened)


@dataclass(frozen=True)
class DatasetWindows:
    """The trajectories of one dataset that windows may come from.

    `episodes` [n] are rows of the dataset, `lengths` [n] their frame counts; `interacting` holds one array of frame
    indices per trajectory (empty where unknown).
    """

    episodes: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    interacting: Sequence[Int[np.ndarray, " k"]]

    def usable(self, rule: WindowRule, min_start_frame: int) -> "DatasetWindows":
        """The same without trajectories that are too short, and with interacting frames restricted to valid starts."""
        counts = np.array([valid_starts(int(n), rule, min_start_frame) for n in self.lengths], np.int64)
        kept = np.flatnonzero(counts)
        inside = [
            frames[(frames >= min_start_frame) & (frames < min_start_frame + counts[i])]
            for i, frames in ((i, np.asarray(self.interacting[i])) for i in kept)
        ]
        return DatasetWindows(self.episodes[kept], self.lengths[kept], inside)


@dataclass(frozen=True)
class WindowGroup:
    """Datasets drawn with equal probability, whatever their sizes; the group is drawn in proportion to `weight`."""

    name: str
    datasets: Sequence[DatasetWindows]
    weight: float = 1.0
    min_start_frame: int = 0


class WindowSampler:
    """Draws windows by the release's rule; build it once, then `sample` is cheap and pure in `rng`.

    A group of weight 0 is never drawn. ValueError if a dataset of another group has no usable trajectory.
    """

    def __init__(self, groups: Sequence[WindowGroup], rule: WindowRule) -> None:
        weights = np.array([group.weight for group in groups], np.float64)
        if not len(weights) or (weights < 0).any() or weights.sum() <= 0:
            given = {group.name: group.weight for group in groups}
            raise ValueError(f"groups: expected non-negative weights with a positive sum, found {given}")
        total = np.cumsum(weights)
        self._cumulative = total / total[-1]  # ends in exactly 1, which rng.random() stays below
        self.rule = rule
        self.groups = [
            replace(group, datasets=[dataset.usable(rule, group.min_start_frame) for dataset in group.datasets])
            for group in groups
        ]
        for group in self.groups:
            empty = [i for i, dataset in enumerate(group.datasets) if not len(dataset.episodes)]
            if group.weight > 0 and (empty or not group.datasets):
                raise ValueError(
                    f"group {group.name!r}: expected in every dataset a trajectory of {rule.min_num_frames} or more "
                    f"frames that holds a window of {rule.min_horizon}, found none in dataset(s) {empty}; "
                    f"remove the dataset or lower min_horizon, stride or min_start_frame"
                )

    def sample(self, rng: np.random.Generator) -> Window:
        """One window: group, dataset, trajectory, start (uniform or at an interaction), then a horizon that fits."""
        rule = self.rule
        g = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        group = self.groups[g]
        # whatever their sizes, as released: a task's failures are as likely as its successes
        d = int(rng.integers(len(group.datasets)))
        dataset = group.datasets[d]
        e = int(rng.integers(len(dataset.episodes)))
        num_frames = int(dataset.lengths[e])
        start = group.min_start_frame + int(rng.integers(valid_starts(num_frames, rule, group.min_start_frame)))
        interacting = dataset.interacting[e]
        if rule.interaction_prob and rng.random() < rule.interaction_prob and len(interacting):
            start = int(interacting[rng.integers(len(interacting))])
        upper = min(rule.max_horizon, feasible_horizon(num_frames, start, rule.stride))
        return Window(g, d, int(dataset.episodes[e]), start, sample_horizon(rng, upper, rule))


def other_windows(windows: Sequence[Window], robots: Sequence[int], *, seed: int) -> list[Window | None]:
    """Another of the windows for each, of the same robot: a fixed permutation without a fixed point.

    The other window is of another episode unless one episode has more than half of a robot's windows. None where a
    robot has a single window.
    """
    others: list[Window | None] = [None] * len(windows)
    for number, robot in enumerate(sorted(set(robots))):
        rng = np.random.default_rng([seed, number])
        episodes: dict[tuple[int, ...], list[int]] = {}
        for i in rng.permutation(np.flatnonzero(np.asarray(robots) == robot)):
            episodes.setdefault(windows[i][:3], []).append(int(i))
        order = [i for mine in episodes.values() for i in mine]
        # an episode's windows are neighbours, so a shift by the most that one has leaves every episode
        shift = max(map(len, episodes.values())) % len(order) or 1
        if len(order) > 1:
            for i, j in zip(order, [*order[shift:], *order[:shift]], strict=True):
                others[i] = windows[j]
    return others


def validation_windows(
    groups: Sequence[WindowGroup], horizon: int, count: int, *, seed: int, stride: int = 1, at_most: bool = False
) -> list[Window]:
    """The fixed list of evaluation windows: `count` different ones of `horizon` frames, balanced over the episodes.

    Episodes of groups with positive weight take turns in a seeded order, so their counts differ by one at most while
    each has windows left; a longer list begins with the shorter one. The same one-frame tail is reserved as in
    training. ValueError if there are fewer than `count` different windows; with `at_most` they are
    what there is.
    """
    rule = WindowRule(min_horizon=horizon, max_horizon=horizon, stride=stride)
    starts: Mapping[tuple[int, int, int], np.ndarray] = {
        (g, d, int(episode)): group.min_start_frame
        + np.random.default_rng([seed, horizon, g, d, int(episode)]).permutation(valid)
        for g, group in enumerate(groups)
        if group.weight > 0
        for d, dataset in enumerate(group.datasets)
        for episode, length in zip(dataset.episodes, dataset.lengths, strict=True)
        if (valid := valid_starts(int(length), rule, group.min_start_frame))
    }
    available = sum(map(len, starts.values()))
    if at_most:
        count = min(count, available)
    if count > available:
        raise ValueError(
            f"evaluation windows of {horizon} frames: expected {count}, found {available} in {len(starts)} held-out "
            f"episodes; lower the count or the horizon, or hold out more episodes (data.val_episodes)"
        )
    order = [list(starts)[i] for i in np.random.default_rng([seed, horizon]).permutation(len(starts))]
    windows: list[Window] = []
    turn = 0
    while len(windows) < count:
        windows += [Window(*key, int(starts[key][turn]), horizon) for key in order if turn < len(starts[key])]
        turn += 1
    return windows[:count]
