"""Rollouts in token space: `advance` makes one prediction, the step of every rollout; `imagine` scans it.

Open-loop evaluation and planning know their actions beforehand and use `imagine`, with candidates as rows of the batch.
The reinforcement learning environment (rl/env.py) calls `advance` directly, because its scan carries more than tokens:
a policy's observations, rewards, and episodes that end and restart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from rlawm_jax.flow import Sampler
from rlawm_jax.rng import stream


class Chunk(NamedTuple):
    """Actions of one prediction: rows padded to a common length, and the number of valid rows."""

    actions: Float[Array, "... b t a"]
    num_actions: Int[Array, "... b"]


class Imagined(NamedTuple):
    """A rollout, time axis first: the tokens after each chunk and the flow-space latents drawn."""

    tokens: Float[Array, "n b l c"]
    latents: Float[Array, "n b k d"]


def advance(
    model: Any,
    tokens: Float[Array, "b l c"],
    chunk: Chunk,
    key: Array,
    *,
    robot_id: Int[Array, " b"],
    ids: Integer[Array, " b"],
    sampler: Sampler,
) -> tuple[Float[Array, "b l c"], Float[Array, "b k d"]]:
    """The tokens after a chunk of actions, and the flow-space latent drawn; noise is keyed by (key, id).

    `model` needs the methods `noise` and `predict` of `WorldModel`. Rows of equal id, tokens and actions get the same
    prediction, wherever they are in the batch.
    """
    noise = model.noise(key, ids)
    return model.predict(tokens, chunk.actions, chunk.num_actions, robot_id, noise, sampler)


def imagine(
    model: Any,
    start: Float[Array, "b l c"],
    chunks: Chunk,
    key: Array,
    *,
    robot_id: Int[Array, " b"],
    ids: Integer[Array, " b"],
    sampler: Sampler,
) -> Imagined:
    """Roll the world model forward from tokens `start`, each prediction feeding the next.

    `chunks` has a leading time axis ([n, b, t, a] and [n, b]). Noise is keyed by (key, step, id).
    """

    def step(tokens: Array, inputs: tuple[Array, Chunk]) -> tuple[Array, Imagined]:
        i, chunk = inputs
        after = advance(model, tokens, chunk, stream(key, "flow_noise", i), robot_id=robot_id, ids=ids, sampler=sampler)
        return after[0], Imagined(*after)

    return jax.lax.scan(step, start, (jnp.arange(len(chunks.num_actions)), chunks))[1]
