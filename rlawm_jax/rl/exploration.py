"""Exploration noise of a chunk of actions: white, or correlated from row to row, with its exact density.

White noise averages out where a chunk's effect is the sum of its rows. Here the noise of every action dimension is a
stationary first-order autoregressive process over the rows (a sampled Ornstein-Uhlenbeck process): rows i and j
correlate by correlation^|i - j|, and each number keeps its standard deviation. The covariance has full rank, so log
density and entropy are exact and PPO's ratio needs no projection. A few knots per chunk would have no density off their
subspace; a ridge that gives them one is a second constant to choose.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Exploration:
    """How the standardised noise of a chunk's `rows` correlates; at `correlation` 0 it is white."""

    rows: int = 1
    correlation: float = 0.0  # of neighbouring rows

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(
                f"config.ppo.exploration_correlation: expected a number in [0, 1), 0 for white noise, found "
                f"{self.correlation}"
            )

    def colour(self, white: Float[Array, "m e"]) -> Float[Array, "m e"]:
        """Correlated noise from standard normal numbers, both flattened row by row."""
        if not self.correlation:
            return white
        lag = np.subtract.outer(np.arange(self.rows), np.arange(self.rows))
        fresh = np.where(np.arange(self.rows) > 0, self._fresh, 1.0)
        factor = np.where(lag >= 0, self.correlation ** np.maximum(lag, 0) * fresh, 0.0)
        # a rounded product would not be what `log_prob` scores
        mixed = jnp.einsum(
            "ij,mja->mia", jnp.asarray(factor, jnp.float32), self._by_row(white), precision=jax.lax.Precision.HIGHEST
        )
        return mixed.reshape(white.shape)

    def whiten(self, coloured: Float[Array, "m e"]) -> Float[Array, "m e"]:
        """The inverse of `colour`."""
        if not self.correlation:
            return coloured
        rows = self._by_row(coloured)
        innovations = (rows[:, 1:] - self.correlation * rows[:, :-1]) / self._fresh
        return jnp.concatenate([rows[:, :1], innovations], axis=1).reshape(coloured.shape)

    def log_volume(self, size: int) -> float:
        """Log determinant of `colour` on `size` numbers; 0 for white noise, else negative."""
        return size // self.rows * (self.rows - 1) * float(np.log(self._fresh))

    @property
    def _fresh(self) -> float:
        """The share of a row's deviation that the row before does not determine."""
        return float(np.sqrt(1 - self.correlation**2))

    def _by_row(self, flat: Float[Array, "m e"]) -> Float[Array, "m k a"]:
        return flat.reshape(len(flat), self.rows, -1)


WHITE = Exploration()
