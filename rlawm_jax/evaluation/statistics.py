"""95 % intervals for clustered means and ratios (an episode's windows are not independent), shares, paired trials."""

from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float, Int

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio of means: its value, its 95 % interval, and the number of values and clusters behind it.

    `low` and `high` are NaN where there is only one cluster, which leaves the interval undefined.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int


@dataclass(frozen=True)
class McNemar:
    """Two methods on the same trials: how many only one of them solved, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


class ClusterBootstrap:
    """Percentile bootstrap that resamples whole clusters; all estimates of one instance use the same draws.

    Values are [n], one per entry of `clusters` [n]; NaN marks a missing value, which is ignored. Percentiles are
    expanded for few clusters (Hesterberg 2015, section 4.4): the plain ones cover 90 % at 10 clusters.
    """

    def __init__(self, clusters: Int[np.ndarray, " n"], *, seed: int, draws: int = DRAWS) -> None:
        names, self._cluster = np.unique(clusters, return_inverse=True)
        self._size = len(names)
        equal = np.full(self._size, 1 / self._size)
        self._weights = np.random.default_rng(seed).multinomial(self._size, equal, draws).astype(np.float64)

    def mean(self, values: Float[np.ndarray, " n"]) -> Estimate | None:
        """The mean of the values that are not missing; None if all are."""
        return self.ratio(values, np.ones_like(values))

    def ratio(self, values: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"]) -> Estimate | None:
        """mean(values) / mean(baseline), paired: only where both exist, and both resampled together."""
        values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
        exists = ~(np.isnan(values) | np.isnan(baseline))
        if not exists.any():
            return None
        above, below = (np.bincount(self._cluster[exists], x[exists], minlength=self._size) for x in (values, baseline))
        clusters = len(np.unique(self._cluster[exists]))
        low = high = np.nan
        if clusters > 1:
            # a draw whose clusters hold no values carries no information
            total = self._weights @ below
            tail = _tail_percent(clusters)
            low, high = np.percentile((self._weights @ above)[total > 0] / total[total > 0], (tail, 100 - tail))
        return Estimate(float(above.sum() / below.sum()), float(low), float(high), int(exists.sum()), clusters)


def crossed_bootstrap(
    values: Float[np.ndarray, "r n"], others: Float[np.ndarray, "q n"] | None = None, *, seed: int, draws: int = DRAWS
) -> Estimate:
    """The mean over runs and cases, minus that of other runs on the same cases; runs and cases are both resampled.

    The other runs are resampled independently: for runs in pairs, pass the differences of the pairs as `values`.
    Percentiles are expanded as in `ClusterBootstrap`, for the smallest count that is resampled. A single run or case
    is not resampled; with one of each the interval is NaN.
    """
    rng = np.random.default_rng(seed)
    cases = values.shape[1]
    picked = rng.multinomial(cases, np.full(cases, 1 / cases), draws) / cases
    means = np.zeros(draws)
    for table, sign in ((values, 1), (others, -1)):
        if table is not None:
            runs = len(table)
            weights = rng.multinomial(runs, np.full(runs, 1 / runs), draws) / runs
            means += sign * np.einsum("dr,dn,rn->d", weights, picked, table, optimize=True)
    value = float(values.mean() - (0 if others is None else others.mean()))
    sizes = [size for size in (len(values), 1 if others is None else len(others), cases) if size > 1]
    low = high = np.nan
    if sizes:
        tail = _tail_percent(min(sizes))
        low, high = np.percentile(means, (tail, 100 - tail))
    return Estimate(value, float(low), float(high), values.size, min(sizes, default=1))


def wilson(successes: int, count: int) -> Estimate:
    """A share of independent trials with Wilson's score interval, which never leaves [0, 1] (Wilson 1927)."""
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"wilson: expected 0 to {count} successes of 1 or more trials, found {successes} of {count}")
    interval = scipy.stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / count, float(interval.low), float(interval.high), count, count)


def mcnemar(first: Bool[np.ndarray, " n"], second: Bool[np.ndarray, " n"]) -> McNemar:
    """McNemar's exact test: without a difference, a trial only one solves is a fair coin toss (McNemar 1947)."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    # binomtest needs at least one trial; without discordant trials there is no evidence of a difference
    p_value = scipy.stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    return McNemar(only_first, only_second, float(p_value))


def _tail_percent(clusters: int) -> float:
    """Percent of draws beyond each end that makes the interval as wide as Student's t interval."""
    student = scipy.stats.t.ppf(0.5 + LEVEL / 2, clusters - 1)
    return float(100 * scipy.stats.norm.cdf(-student * np.sqrt(clusters / (clusters - 1))))
