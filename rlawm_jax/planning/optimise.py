"""Optimisers over action sequences: the cross-entropy method (CEM), MPPI, and gradient descent through the model.

A sequence is described by knots, one every few rows, and interpolated linearly between them: fewer numbers to search,
and smooth motion. Shapes: g goals, n candidates, k knots, h action rows, a action dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from rlawm_jax.rng import stream

# candidates -> their costs, for a noise key
Cost = Callable[[Float[Array, "g n h a"], Array], Float[Array, "g n"]]
METHODS = ("cem", "mppi", "gradient")


@dataclass(frozen=True)
class Search:
    """Settings of a search; `low` and `high` bound every action row.

    `candidates` per round and goal; `spread`, the first round's standard deviation as a share of half the range;
    `elites`, the share of candidates that CEM keeps; `temperature` of MPPI's weights, in standard deviations of the
    costs; `rate`, the step of gradient descent as a share of half the range.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    method: str = "cem"
    rounds: int = 6
    candidates: int = 96
    every: int = 4
    spread: float = 0.6
    elites: float = 0.1
    temperature: float = 0.3
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method: expected one of {', '.join(METHODS)}, found {self.method!r}")

    @property
    def scale(self) -> Float[Array, " a"]:
        """Half the range of every action dimension."""
        return (jnp.asarray(self.high) - jnp.asarray(self.low)) / 2

    def clip(self, knots: Float[Array, "... a"]) -> Float[Array, "... a"]:
        """Within the bounds."""
        return jnp.clip(knots, jnp.asarray(self.low), jnp.asarray(self.high))

    def num_knots(self, rows: int) -> int:
        """Knots of a sequence of `rows`."""
        return -(-rows // self.every) + 1

    def rows(self, knots: Float[Array, "... k a"], rows: int) -> Float[Array, "... h a"]:
        """Action rows interpolated linearly between the knots."""
        return jnp.einsum("hk,...ka->...ha", interpolation(self.num_knots(rows), rows, self.every), knots)


def interpolation(knots: int, rows: int, every: int) -> Float[np.ndarray, "h k"]:
    """The weights of each knot in each row."""
    at = np.arange(rows)[:, None] / every
    return np.maximum(0.0, 1.0 - np.abs(at - np.arange(knots)[None])).astype(np.float32)


def optimise(
    search: Search, cost: Cost, start: Float[Array, "g k a"], rows: int, key: Array
) -> tuple[Float[Array, "g h a"], Float[Array, " g"]]:
    """The best action rows found for each goal, searching from the knots `start`, and their cost.

    The noise that the cost is measured with stays the same through the search, so costs of all rounds compare.
    """
    run = {"cem": _sample, "mppi": _sample, "gradient": _descend}[search.method]
    best, lowest = run(search, lambda knots: cost(search.rows(knots, rows), stream(key, "cost")), start, key)
    return search.rows(best, rows), lowest


def _better(best: tuple[Array, Array], knots: Float[Array, "g n k a"], costs: Float[Array, "g n"]):
    """The cheaper of the best so far and the cheapest candidate, per goal."""
    first = jnp.argmin(costs, axis=1)
    knots = jnp.take_along_axis(knots, first[:, None, None, None], axis=1)[:, 0]
    costs = costs.min(axis=1)
    return jnp.where((costs < best[1])[:, None, None], knots, best[0]), jnp.minimum(costs, best[1])


def _sample(search: Search, cost: Callable, start: Array, key: Array) -> tuple[Array, Array]:
    """CEM and MPPI: draw candidates around a mean, then move the mean towards the cheap ones."""
    count = max(2, round(search.elites * search.candidates))

    def step(carry, i):
        mean, std, best = carry
        noise = jax.random.normal(stream(key, "candidates", i), (len(mean), search.candidates, *mean.shape[1:]))
        # the mean itself is a candidate: a search never ends worse than it began
        knots = search.clip(mean[:, None] + (std[:, None] * noise).at[:, 0].set(0.0))
        costs = cost(knots)
        best = _better(best, knots, costs)
        if search.method == "cem":
            chosen = jnp.argsort(costs, axis=1)[:, :count]
            elite = jnp.take_along_axis(knots, chosen[:, :, None, None], axis=1)
            mean, std = elite.mean(axis=1), elite.std(axis=1)
        else:
            spread = costs.std(axis=1, keepdims=True) + 1e-8
            weights = jax.nn.softmax(-costs / (search.temperature * spread), axis=1)
            mean = jnp.einsum("gn,gnka->gka", weights, knots)
        return (mean, std, best), None

    std = jnp.broadcast_to(search.spread * search.scale, start.shape)
    first = (start, jnp.full(len(start), jnp.inf))
    return jax.lax.scan(step, (start, std, first), jnp.arange(search.rounds))[0][2]


def _descend(search: Search, cost: Callable, start: Array, key: Array) -> tuple[Array, Array]:
    """Adam on the knots of all candidates at once, through the model; random starts around the given one."""
    noise = jax.random.normal(stream(key, "candidates", 0), (len(start), search.candidates, *start.shape[1:]))
    knots = search.clip(start[:, None] + (search.spread * search.scale * noise).at[:, 0].set(0.0)) / search.scale
    adam = optax.adam(search.rate)

    def total(knots):
        costs = cost(knots * search.scale)
        return costs.sum(), costs

    def step(carry, _):
        knots, moments, best = carry
        (_, costs), gradient = jax.value_and_grad(total, has_aux=True)(knots)
        best = _better(best, knots * search.scale, costs)
        updates, moments = adam.update(gradient, moments)
        knots = search.clip((knots + updates) * search.scale) / search.scale
        return (knots, moments, best), None

    first = (start, jnp.full(len(start), jnp.inf))
    return jax.lax.scan(step, (knots, adam.init(knots), first), None, length=search.rounds)[0][2]
