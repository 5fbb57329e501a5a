"""A planner: from the current frames and goal frames to action rows, as one compiled program per length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from rlawm_jax.planning.cost import GoalCost
from rlawm_jax.planning.optimise import Search, optimise
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel


class Planner:
    """Searches for actions that bring the imagined tokens to those of a goal frame; `batch` goals in one call.

    Each plan starts from the knots of the plan before it, moved on by the rows executed since.
    """

    def __init__(
        self, model: WorldModel, cost: GoalCost, search: Search, *, batch: int, robot_id: int = 0, seed: int = 0
    ) -> None:
        self.cost, self.search, self.batch, self.robot_id = cost, search, batch, robot_id
        graphdef, self._state = nnx.split(model)
        self._key = stream(jax.random.key(seed), "planning")
        self._encode = jax.jit(lambda state, frames: nnx.merge(graphdef, state).encode(frames))

        def plan(rows, state, start, goal, knots, key):
            model = nnx.merge(graphdef, state)
            robots = jnp.full(len(start), robot_id, jnp.int32)
            # frames are encoded and costs are taken without gradients of the parameters
            measure = partial(cost, model, start, goal, robots)
            return optimise(search, measure, knots, rows, key)

        self._plan = jax.jit(plan, static_argnums=0)

    @property
    def chunk(self) -> int:
        """Action rows of one prediction."""
        return self.cost.chunk

    def whole(self, rows: int) -> int:
        """`rows` as predictions of equal length: as many as are nearest to `rows` / chunk, at least one.

        A prediction more would cost time and accuracy, to arrive less than half a chunk later; and a short way is
        predicted better in few rows than in many.
        """
        predictions = max(1, round(rows / self.chunk))
        return predictions * min(self.chunk, max(self.search.every, -(-rows // predictions)))

    def encode(self, frames: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n l c"]:
        """Tokens of frames, `batch` at a time."""
        return self._in_batches(lambda part: self._encode(self._state, part), frames)

    def plan(
        self,
        start: Float[np.ndarray, "n l c"],
        goal: Float[np.ndarray, "n l c"],
        rows: int,
        *,
        turn: int,
        previous: Float[np.ndarray, "n left a"] | None = None,
    ) -> Float[np.ndarray, "n h a"]:
        """Action rows that lead from `start` to `goal`, about `rows` of them (see `whole`).

        `turn` numbers the plans of an episode, for the noise; `previous` are the rows of the last plan that were not
        executed.
        """
        rows = self.whole(rows)
        knots = self._first_knots(len(start), rows, previous)
        key = stream(self._key, "turn", turn)
        return self._in_batches(lambda *part: self._plan(rows, self._state, *part, key)[0], start, goal, knots)

    def _first_knots(self, count: int, rows: int, previous: np.ndarray | None) -> Float[np.ndarray, "n k a"]:
        """The middle of the range, or the rows that the last plan left, read at the knots."""
        middle = (np.asarray(self.search.low) + np.asarray(self.search.high)) / 2
        knots = np.tile(middle.astype(np.float32), (count, self.search.num_knots(rows), 1))
        if previous is not None and previous.shape[1]:
            at = np.minimum(np.arange(knots.shape[1]) * self.search.every, previous.shape[1] - 1)
            knots = previous[:, at]
        return knots

    def _in_batches(self, work, *arrays: np.ndarray) -> np.ndarray:
        """One compiled size: the last batch is filled up by repeating its last row."""
        done = []
        for i in range(0, len(arrays[0]), self.batch):
            parts = [array[i : i + self.batch] for array in arrays]
            size = len(parts[0])
            filled = [np.concatenate([part, np.repeat(part[-1:], self.batch - size, axis=0)]) for part in parts]
            done.append(np.asarray(work(*filled))[:size])
        return np.concatenate(done)
