"""The cost of candidate action sequences: how far the imagined tokens end from the goal's.

Shapes: g goals, n candidates, m noise draws, h action rows, a action dimensions, l patches, c channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, imagine

APPROACHES = ("end", "closest")

# (imagined tokens, goal tokens) -> how far apart they are
Distance = Callable[[Float[Array, "*b l c"], Float[Array, "*#b l c"]], Float[Array, "*b"]]


def token_distance(imagined: Float[Array, "*b l c"], goal: Float[Array, "*#b l c"]) -> Float[Array, "*b"]:
    """Mean absolute difference of tokens."""
    return jnp.abs(imagined - goal).mean(axis=(-2, -1))


@dataclass(frozen=True)
class GoalCost:
    """`distance` between imagined and goal tokens, averaged over `draws` of the flow's noise, plus the effort.

    `chunk` is the largest number of action rows of one prediction; longer sequences are split evenly. `approach` "end"
    compares the tokens after the last row; "closest" takes the smallest distance after any prediction, so that arriving
    early is as good as arriving late.
    `effort` weighs the mean absolute action, in raw units: where zeros hold the robot still, the one of two arriving
    plans that moves less is cheaper.
    """

    chunk: int
    draws: int
    approach: str
    sampler: Sampler
    distance: Distance = token_distance
    effort: float = 0.0

    def __post_init__(self) -> None:
        if self.approach not in APPROACHES:
            raise ValueError(f"--cost: expected one of {', '.join(APPROACHES)}, found {self.approach!r}")

    def __call__(
        self,
        model: Any,
        start: Float[Array, "g l c"],
        goal: Float[Array, "g l c"],
        robot_id: Int[Array, " g"],
        actions: Float[Array, "g n h a"],
        key: Array,
    ) -> Float[Array, "g n"]:
        """Costs of every goal's candidates, whose rows divide into whole predictions (`Planner.whole`).

        All candidates of a goal meet the same noise.
        """
        goals, candidates, rows, width = actions.shape
        chunks = -(-rows // self.chunk)
        each = rows // chunks
        shape = (goals, candidates, self.draws)

        def spread(x: Array) -> Array:
            x = x.reshape(goals, 1, 1, *x.shape[1:])
            return jnp.broadcast_to(x, (*shape, *x.shape[3:])).reshape(-1, *x.shape[3:])

        draw = jnp.arange(goals * self.draws, dtype=jnp.uint32).reshape(goals, 1, self.draws)
        batch = jnp.broadcast_to(actions[:, :, None], (*shape, rows, width)).reshape(-1, chunks, each, width)
        imagined = imagine(
            model,
            spread(start),
            Chunk(batch.swapaxes(0, 1), jnp.full((chunks, len(batch)), each, jnp.int32)),
            key,
            robot_id=spread(robot_id),
            ids=jnp.broadcast_to(draw, shape).reshape(-1),
            sampler=self.sampler,
        )
        distance = self.distance(imagined.tokens, spread(goal)[None])
        reached = distance[-1] if self.approach == "end" else distance.min(axis=0)
        return reached.reshape(shape).mean(axis=2) + self.effort * jnp.abs(actions).mean(axis=(2, 3))
