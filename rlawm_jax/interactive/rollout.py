"""Rollouts that grow by one action row at a time.

The model predicts the tokens after a whole chunk: it reads the tokens of a frame and up to a chunk of action rows. So a
chunk under way is predicted again from its first tokens at every step, with one row more, and never from the
prediction one row before: that is the input it was trained on, and errors do not add up within a chunk. The tokens
after a full chunk are the first ones of the next, exactly as evaluation rolls out (imagination.py,
evaluation/chunking.py). The noise of a chunk is the same however many rows it has, so the picture does not flicker
while it grows. Rows are padded to a full chunk, so all steps are one compiled program.

A model trained with the action issued at a window's last frame (`data.last_action`) reads one row more than frames have
passed. That action is not known yet: the row just given stands in for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, advance
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel


class Moment(NamedTuple):
    """Where a rollout is: the chunk's first tokens, its number, its rows so far, and the tokens that they lead to."""

    first: Float[np.ndarray, "l c"]
    chunk: int
    rows: tuple[Float[np.ndarray, " a"], ...]
    tokens: Float[np.ndarray, "l c"]


class Rollout:
    """A world model whose rollouts grow row by row; `rows` is the length of a full chunk.

    `width` is that of the model's action rows; narrower robots' rows are padded.
    """

    def __init__(
        self,
        model: WorldModel,
        sampler: Sampler,
        *,
        rows: int,
        width: int,
        last_action: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.last_action = rows, last_action
        self._shape = (1, rows + last_action, width)
        graphdef, self._state = nnx.split(model)

        def predict(state: nnx.State, key: Array, given: tuple[Array, Chunk, Array, Array]) -> Array:
            tokens, chunk, robot_id, ids = given
            model = nnx.merge(graphdef, state)
            return advance(model, tokens, chunk, key, robot_id=robot_id, ids=ids, sampler=sampler)[0]

        self.key = stream(jax.random.key(seed), "interactive")
        self._predict = jax.jit(predict)
        self._encode = jax.jit(lambda state, frames: nnx.merge(graphdef, state).encode(frames))
        self._decode = jax.jit(lambda state, tokens: jnp.round(255 * nnx.merge(graphdef, state).decode(tokens)))

    def encode(self, frame: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "l c"]:
        """Tokens of a frame."""
        return np.asarray(self._encode(self._state, frame[None])[0])

    def decode(self, tokens: Float[np.ndarray, "l c"]) -> UInt8[np.ndarray, "h w 3"]:
        """The frame that the image decoder makes of tokens."""
        return np.asarray(self._decode(self._state, tokens[None])[0]).astype(np.uint8)

    @staticmethod
    def begin(tokens: Float[np.ndarray, "l c"]) -> Moment:
        """The start of a rollout, before any action."""
        return Moment(tokens, 0, (), tokens)

    def step(self, moment: Moment, row: Float[np.ndarray, " a"], *, robot_id: int = 0, draw: int = 0) -> Moment:
        """One action row further; `draw` numbers the noise, which depends on it and on the chunk alone."""
        if len(moment.rows) == self.rows:
            moment = self.begin(moment.tokens)._replace(chunk=moment.chunk + 1)
        rows = (*moment.rows, np.asarray(row, np.float32))
        given = np.stack([*rows, *rows[-1:]] if self.last_action else rows)
        padded = np.zeros(self._shape, np.float32)
        padded[0, : len(given), : given.shape[1]] = given
        chunk = Chunk(jnp.asarray(padded), jnp.array([len(given)], jnp.int32))
        who = np.array([robot_id], np.int32), np.array([draw], np.uint32)
        key = stream(self.key, "flow_noise", moment.chunk)
        tokens = self._predict(self._state, key, (moment.first[None], chunk, *who))
        return moment._replace(rows=rows, tokens=np.asarray(tokens[0]))
