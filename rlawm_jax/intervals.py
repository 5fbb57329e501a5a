"""Means and ratios with 95 % intervals for clustered values: windows of one episode are not independent."""

from dataclasses import dataclass

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio of means: its value, its 95 % interval, and how many values and clusters it rests on.

    `low` and `high` are NaN where one cluster alone leaves the interval undefined.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int


class ClusterBootstrap:
    """Percentile bootstrap that redraws whole clusters; every estimate of one instance sees the same draws.

    Values are [n], one per entry of `clusters` [n]; NaN marks a value that does not exist and is left out. Percentiles
    are expanded for few clusters (Hesterberg 2015, section 4.4): the plain ones cover 90 % at 10 clusters.
    """

    def __init__(self, clusters: Int[np.ndarray, " n"], *, seed: int, draws: int = DRAWS) -> None:
        names, self._cluster = np.unique(clusters, return_inverse=True)
        self._size = len(names)
        equal = np.full(self._size, 1 / self._size)
        self._weights = np.random.default_rng(seed).multinomial(self._size, equal, draws).astype(np.float64)

    def mean(self, values: Float[np.ndarray, " n"]) -> Estimate | None:
        """The mean of the values that exist; None if none does."""
        return self.ratio(values, np.ones_like(values))

    def ratio(self, values: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " n"]) -> Estimate | None:
        """mean(values) / mean(baseline), paired: only where both exist, and both redrawn together."""
        values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
        exists = ~(np.isnan(values) | np.isnan(baseline))
        if not exists.any():
            return None
        above, below = (np.bincount(self._cluster[exists], x[exists], minlength=self._size) for x in (values, baseline))
        clusters = len(np.unique(self._cluster[exists]))
        low = high = np.nan
        if clusters > 1:
            # a draw of clusters without a single value says nothing
            total = self._weights @ below
            tail = _tail_percent(clusters)
            low, high = np.percentile((self._weights @ above)[total > 0] / total[total > 0], (tail, 100 - tail))
        return Estimate(float(above.sum() / below.sum()), float(low), float(high), int(exists.sum()), clusters)


def _tail_percent(clusters: int) -> float:
    """Percent of draws beyond each end, so that the interval is as wide as Student's would be."""
    student = scipy.stats.t.ppf(0.5 + LEVEL / 2, clusters - 1)
    return float(100 * scipy.stats.norm.cdf(-student * np.sqrt(clusters / (clusters - 1))))
