"""The window sampler against the release's rule, by hand-computed cases and exact probabilities.

Statistical bounds: chi-square tests with fixed seeds at p > 1e-4, so a right sampler fails once in 10,000 choices of
seed; the tests' power is shown by the wrong laws they reject.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from data.windows import (
    DatasetWindows,
    Window,
    WindowGroup,
    WindowRule,
    WindowSampler,
    feasible_horizon,
    interacting_frames,
    other_windows,
    sample_horizon,
    valid_starts,
    validation_windows,
)

P_VALUE = 1e-4
NONE = np.zeros(0, np.int64)


def dataset(*lengths: int, interacting: dict[int, list[int]] | None = None, first_row: int = 0) -> DatasetWindows:
    rows = np.arange(first_row, first_row + len(lengths))
    frames = [np.array((interacting or {}).get(i, NONE), np.int64) for i in range(len(lengths))]
    return DatasetWindows(rows, np.array(lengths), frames)


def draw(groups: list[WindowGroup], rule: WindowRule, count: int, seed: int = 0) -> list[Window]:
    sampler, rng = WindowSampler(groups, rule), np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


def p_value(counts: Counter, probabilities: dict) -> float:
    """p-value of the counts under the probabilities; outcomes of probability zero must not occur.

    Cells with fewer than five expected draws are pooled, as the chi-square approximation asks.
    """
    assert set(counts) <= set(probabilities), f"impossible outcomes {set(counts) - set(probabilities)}"
    total = sum(counts.values())
    cells = sorted((p * total, counts[key]) for key, p in probabilities.items())
    expected, observed = map(list, zip(*cells, strict=True))
    while len(expected) > 1 and expected[0] < 5:
        expected[:2], observed[:2] = [expected[0] + expected[1]], [observed[0] + observed[1]]
    return 1.0 if len(expected) == 1 else stats.chisquare(observed, expected).pvalue


def horizon_law(low: int, upper: int, sampling: str) -> dict[int, float]:
    """P(h) of the rule, from its definition: h = low + int(p * n), p ~ Beta(5,2) or uniform."""
    n = upper - low + 1
    cdf = stats.beta(5, 2).cdf if sampling == "beta" else stats.uniform.cdf
    return {low + k: float(cdf((k + 1) / n) - cdf(k / n)) for k in range(n)}


@pytest.mark.parametrize(
    ("num_frames", "min_horizon", "stride", "min_start", "expected"),
    [(10, 2, 1, 0, 8), (10, 5, 1, 0, 5), (10, 5, 1, 3, 2), (10, 3, 2, 0, 5), (10, 5, 2, 1, 0), (4, 2, 1, 0, 0)],
)
def test_number_of_valid_starts_is_that_of_the_release(num_frames, min_horizon, stride, min_start, expected):
    assert valid_starts(num_frames, WindowRule(min_horizon=min_horizon, stride=stride), min_start) == expected


@pytest.mark.parametrize(
    ("num_frames", "start", "stride", "expected"),
    [(10, 0, 1, 9), (10, 7, 1, 2), (10, 0, 2, 5), (10, 0, 3, 3), (10, 9, 1, 0)],
)
def test_feasible_horizon_is_that_of_the_release(num_frames, start, stride, expected):
    assert feasible_horizon(num_frames, start, stride) == expected


def test_one_frame_is_reserved_at_the_tail_and_no_more():
    for num_frames in range(5, 40):
        for stride in (1, 2, 3):
            rule = WindowRule(min_horizon=3, stride=stride)
            starts = range(valid_starts(num_frames, rule))
            for start in starts:
                longest = feasible_horizon(num_frames, start, stride)
                last = start + (longest - 1) * stride
                assert longest >= rule.min_horizon
                assert last + 1 <= num_frames - 1 < last + 1 + stride
            beyond = len(starts)
            assert feasible_horizon(num_frames, beyond, stride) < rule.min_horizon


def test_no_drawn_window_touches_the_last_frame():
    rule = WindowRule(stride=2, interaction_prob=0.5)
    groups = [WindowGroup("g", [dataset(9, 14, 40, interacting={2: list(range(40))})])]
    lengths = [9, 14, 40]
    lasts = [(w.start + (w.horizon - 1) * 2, lengths[w.episode]) for w in draw(groups, rule, 3000)]
    assert all(last <= length - 2 for last, length in lasts)
    assert any(last == length - 2 for last, length in lasts)


@pytest.mark.parametrize("sampling", ["beta", "uniform"])
@pytest.mark.parametrize("upper", [2, 3, 15])
def test_horizons_follow_the_law_of_the_rule_and_not_the_other(sampling, upper):
    rule, rng = WindowRule(horizon_sampling=sampling), np.random.default_rng(1)
    counts = Counter(sample_horizon(rng, upper, rule) for _ in range(30_000))
    assert p_value(counts, horizon_law(2, upper, sampling)) > P_VALUE
    if upper > 2:
        assert p_value(counts, horizon_law(2, upper, "uniform" if sampling == "beta" else "beta")) < 1e-12


def exact_law(groups: list[WindowGroup], rule: WindowRule) -> dict[Window, float]:
    """Probability of every possible window, spelled out step by step from METHOD.md 13.4."""
    law: Counter = Counter()
    total = sum(group.weight for group in groups)
    for g, group in enumerate(groups):
        for d, data in enumerate(group.datasets):
            counts = {
                i: max(0, int(n) - (group.min_start_frame + (rule.min_horizon - 1) * rule.stride + 1))
                for i, n in enumerate(data.lengths)
                if n >= 5
            }
            counts = {i: count for i, count in counts.items() if count}
            for i, count in counts.items():
                p_episode = group.weight / total / len(group.datasets) / len(counts)
                valid = range(group.min_start_frame, group.min_start_frame + count)
                hot = [f for f in data.interacting[i] if f in valid]
                for start in valid:
                    p_start = 1 / count
                    if hot:
                        p_start = (1 - rule.interaction_prob) / count + rule.interaction_prob * (start in hot) / len(
                            hot
                        )
                    upper = min(rule.max_horizon, (int(data.lengths[i]) - start - 2) // rule.stride + 1)
                    for h, p in horizon_law(rule.min_horizon, upper, rule.horizon_sampling).items():
                        law[Window(g, d, int(data.episodes[i]), start, h)] += p_episode * p_start * p
    return {window: p for window, p in law.items() if p > 0}


@pytest.mark.parametrize("sampling", ["beta", "uniform"])
def test_joint_law_of_group_dataset_episode_start_and_horizon(sampling):
    rule = WindowRule(2, 4, horizon_sampling=sampling, interaction_prob=0.6)
    groups = [
        WindowGroup("a", [dataset(6, 9, interacting={1: [0, 3, 8]}), dataset(7, 4, 8, first_row=5)], weight=1.0),
        WindowGroup("b", [dataset(8, interacting={0: [1, 4]})], weight=3.0, min_start_frame=2),
        WindowGroup("never", [dataset(20)], weight=0.0),
    ]
    law = exact_law(groups, rule)
    counts = Counter(draw(groups, rule, 40_000))
    assert p_value(counts, law) > P_VALUE
    assert p_value(counts, exact_law(groups, replace(rule, interaction_prob=0.5))) < 1e-12


def test_weights_choose_groups_and_sizes_do_not_choose_datasets_or_episodes():
    groups = [
        WindowGroup("small", [dataset(10), dataset(*[30] * 50)], weight=0.2),
        WindowGroup("zero", [dataset(10)], weight=0.0),
        WindowGroup("large", [dataset(8, 80)], weight=0.6),
    ]
    windows = draw(groups, WindowRule(), 20_000)
    assert p_value(Counter(w.group for w in windows), {0: 0.25, 2: 0.75}) > P_VALUE
    assert p_value(Counter(w.dataset for w in windows if w.group == 0), {0: 0.5, 1: 0.5}) > P_VALUE
    assert p_value(Counter(w.episode for w in windows if w.group == 2), {0: 0.5, 1: 0.5}) > P_VALUE


def test_a_last_group_of_weight_zero_is_never_drawn_even_at_the_edge_of_the_unit_interval():
    class Edge:
        """The largest number that rng.random() can return."""

        def __init__(self):
            self.rng = np.random.default_rng(0)

        def __getattr__(self, name):
            return getattr(self.rng, name)

        def random(self):
            return 1.0 - 2.0**-53

    groups = [WindowGroup(str(i), [dataset(10)], weight=w) for i, w in enumerate([0.1, 0.2, 0.7, 0.0])]
    assert WindowSampler(groups, WindowRule()).sample(Edge()).group == 2


def test_interaction_biased_starts_are_interacting_frames_that_are_valid():
    rule = WindowRule(min_horizon=5, interaction_prob=1.0)
    groups = [WindowGroup("g", [dataset(20, 20, interacting={0: [1, 6, 9, 16, 19]})], min_start_frame=4)]
    windows = draw(groups, rule, 2000)
    assert {w.start for w in windows if w.episode == 0} == {6, 9}
    assert {w.start for w in windows if w.episode == 1} == set(range(4, 15))


def test_trajectories_without_a_window_are_never_drawn():
    groups = [WindowGroup("g", [dataset(4, 5, 3, 9)])]
    assert {w.episode for w in draw(groups, WindowRule(), 500)} == {1, 3}
    assert {w.episode for w in draw(groups, WindowRule(min_horizon=5), 500)} == {3}


def test_interacting_frames_need_a_near_object_that_moves_and_are_widened():
    effector = np.zeros((40, 3), np.float32)
    near, far, still = np.zeros((40, 3)), np.full((40, 3), 5.0), np.full((40, 3), 0.1)
    near[20:, 0] = 0.01  # moves between frames 19 and 20: frame 20 moved
    far[10:, 0] = 6.0
    objects = np.stack([near, far, still], axis=1)
    np.testing.assert_array_equal(interacting_frames(effector, objects, 0.25, 0.002, 3), np.arange(17, 24))
    np.testing.assert_array_equal(interacting_frames(effector, objects, 0.25, 0.002, 0), [20])
    assert not len(interacting_frames(effector, objects, 0.25, 0.02, 3))
    assert not len(interacting_frames(effector, objects[:, 1:], 0.25, 0.002, 3))


def test_interaction_thresholds_are_strict_and_widening_stops_at_the_ends():
    effector, objects = np.zeros((6, 2)), np.zeros((6, 1, 2))
    objects[1:, 0, 0] = 0.25
    assert not len(interacting_frames(effector, objects, 0.25, 0.0, 3))
    np.testing.assert_array_equal(interacting_frames(effector, objects, 0.26, 0.0, 3), np.arange(5))
    assert not len(interacting_frames(effector, objects, 0.26, 0.25, 3))


def test_validation_windows_are_fixed_balanced_distinct_and_fit():
    groups = [
        WindowGroup("a", [dataset(20, 30), dataset(25)], min_start_frame=2),
        WindowGroup("off", [dataset(50)], weight=0.0),
    ]
    windows = validation_windows(groups, 8, 20, seed=0)
    assert windows == validation_windows(groups, 8, 20, seed=0)
    assert windows[:7] == validation_windows(groups, 8, 7, seed=0)
    assert windows != validation_windows(groups, 8, 20, seed=1)
    assert len(set(windows)) == 20
    assert sorted(Counter((w.group, w.dataset, w.episode) for w in windows).values()) == [6, 7, 7]
    lengths = {(0, 0): 20, (0, 1): 30, (1, 0): 25}
    assert all(w.start >= 2 and w.start + w.horizon <= lengths[w.dataset, w.episode] - 1 for w in windows)
    assert {w.horizon for w in windows} == {8}


def test_validation_windows_can_be_exhausted_and_no_further():
    groups = [WindowGroup("a", [dataset(10, 12, 8)])]
    windows = validation_windows(groups, 8, 6, seed=0)  # 10-8 + 12-8 + 0 starts
    assert {(w.episode, w.start) for w in windows} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)}
    with pytest.raises(ValueError, match=r"8 frames: expected 7, found 6 in 2 held-out episodes; lower the count"):
        validation_windows(groups, 8, 7, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowRule(min_horizon=1), "min_horizon, max_horizon: expected 2 <= min <= max"),
        (lambda: WindowRule(min_horizon=9, max_horizon=8), "found 9, 8"),
        (lambda: WindowRule(stride=0), "stride: expected at least 1, found 0"),
        (lambda: WindowRule(horizon_sampling="Beta"), "horizon_sampling: expected one of .* found 'Beta'"),
        (lambda: WindowRule(interaction_prob=1.5), "interaction_prob: expected a probability, found 1.5"),
        (
            lambda: WindowSampler([WindowGroup("a", [dataset(9)], weight=0.0)], WindowRule()),
            "groups: .* found {'a': 0.0}",
        ),
        (
            lambda: WindowSampler([WindowGroup("a", [dataset(9), dataset(4)])], WindowRule()),
            r"group 'a': .* \[1\]; remove",
        ),
    ],
)
def test_bad_rules_and_groups_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_another_window_is_of_the_same_robot_and_another_episode_and_each_is_used_once():
    windows = validation_windows([WindowGroup("all", [dataset(*[30] * 9)])], 8, 60, seed=3)
    robots = [window.episode % 3 for window in windows]
    others = other_windows(windows, robots, seed=5)
    assert sorted(others) == sorted(windows)
    for window, other in zip(windows, others, strict=True):
        assert other.episode != window.episode and other.episode % 3 == window.episode % 3
    assert others == other_windows(windows, robots, seed=5) != other_windows(windows, robots, seed=6)


def test_no_window_is_its_own_other_even_within_one_episode_and_a_single_one_has_none():
    windows = [Window(0, 0, 0, start, 5) for start in range(4)] + [Window(0, 0, 1, 0, 5)]
    others = other_windows(windows, [7, 7, 7, 7, 2], seed=0)
    assert others[4] is None and sorted(others[:4]) == windows[:4]
    assert all(other != window for other, window in zip(others, windows, strict=True))


def test_at_most_so_many_windows_are_as_many_as_there_are():
    groups = [WindowGroup("all", [dataset(10)])]
    assert validation_windows(groups, 8, 50, seed=0, at_most=True) == validation_windows(groups, 8, 2, seed=0)
