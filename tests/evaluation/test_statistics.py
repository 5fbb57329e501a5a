"""Statistics against tables worked out by hand."""

import numpy as np
import pytest

from rlawm_jax.evaluation.statistics import ClusterBootstrap, mcnemar, wilson

SQUARE = 1.959963984540054**2


def test_wilson_at_no_success_in_ten_is_zero_to_z_squared_over_n_plus_z_squared():
    found = wilson(0, 10)
    assert (found.value, found.low, found.count) == (0.0, 0.0, 10)
    assert found.high == pytest.approx(SQUARE / (10 + SQUARE))  # 0.2775


def test_wilson_at_five_in_ten_is_symmetric_about_a_half():
    found = wilson(5, 10)
    half = 0.5 * np.sqrt(SQUARE / (10 + SQUARE))  # of z sqrt(pq/n + z^2/4n^2) / (1 + z^2/n) at p = 1/2
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))  # 0.2366, 0.7634


def test_wilson_mirrors_when_failures_become_successes_and_stays_inside():
    for successes, count in ((0, 1), (3, 7), (200, 200), (1, 200)):
        found, mirrored = wilson(successes, count), wilson(count - successes, count)
        assert (found.low, found.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))
        assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_counts_that_cannot_be(successes, count):
    with pytest.raises(ValueError, match="wilson: expected"):
        wilson(successes, count)


def pairs(only_first, only_second, both, neither):
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return np.array(first), np.array(second)


def test_mcnemar_is_the_binomial_of_the_discordant_pairs_alone():
    """1 against 7: twice the chance of at most one head in eight throws, 2 (1 + 8) / 256."""
    for both, neither in ((0, 0), (40, 3)):
        found = mcnemar(*pairs(1, 7, both, neither))
        assert (found.only_first, found.only_second) == (1, 7)
        assert found.p_value == pytest.approx(18 / 256)
    assert mcnemar(*pairs(7, 1, 0, 0)).p_value == pytest.approx(18 / 256)
    assert mcnemar(*pairs(0, 6, 1, 1)).p_value == pytest.approx(2 / 64)


def test_mcnemar_sees_no_difference_in_equal_or_balanced_outcomes():
    assert mcnemar(*pairs(0, 0, 5, 5)).p_value == 1.0
    assert mcnemar(*pairs(4, 4, 0, 0)).p_value == 1.0


def test_a_paired_bootstrap_is_as_narrow_as_the_differences_not_as_the_values():
    rng = np.random.default_rng(0)
    shared, noise = rng.normal(0, 1, 200), rng.normal(0, 0.01, 200)
    bootstrap = ClusterBootstrap(np.arange(200), seed=0)
    found = bootstrap.mean(shared + 0.1 + noise - shared)
    assert found is not None
    # 0.01 / sqrt(200) standard errors, 1.96 of them to each side; the resampling's own noise is below a tenth
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01 / np.sqrt(200), rel=0.15)
    assert found.low < 0.1 + noise.mean() < found.high
