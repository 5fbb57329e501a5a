"""Rollouts in token space: one `lax.scan`, for open-loop evaluation and for reinforcement learning alike."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from rlawm_jax.flow import Sampler
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel


class Chunk(NamedTuple):
    """Actions of one prediction: rows padded to a common length, and how many of them count."""

    actions: Float[Array, "b t a"]
    num_actions: Int[Array, " b"]


class Imagined(NamedTuple):
    """What a rollout saw, time first: tokens after each chunk, the latents drawn, the actions taken."""

    tokens: Float[Array, "n b l c"]
    latents: Float[Array, "n b k d"]
    chunks: Chunk


Policy = Callable[[Float[Array, "b l c"], Array], Chunk]


def imagine(
    model: WorldModel,
    start: Float[Array, "b l c"],
    policy_or_chunks: Policy | Chunk,
    key: Array,
    *,
    robot_id: Int[Array, " b"],
    ids: Integer[Array, " b"],
    sampler: Sampler,
    num_chunks: int | None = None,
) -> Imagined:
    """Roll the world model forward from tokens `start`, each prediction feeding the next.

    `policy_or_chunks`: recorded actions as a `Chunk` with a leading time axis ([n, b, t, a] and [n, b]), or a callable
    (tokens, key) -> Chunk, for which `num_chunks` is required. Noise is keyed by (key, step, id): a window's rollout
    does not depend on its place in the batch.
    """
    if isinstance(policy_or_chunks, Chunk):
        policy, chunks, steps = None, policy_or_chunks, policy_or_chunks.num_actions.shape[0]
    elif num_chunks is None:
        raise ValueError("imagine: a policy needs num_chunks, the number of predictions to roll")
    else:
        policy, chunks, steps = policy_or_chunks, None, num_chunks

    def step(tokens, inputs):
        i, chunk = inputs
        if policy is not None:
            chunk = policy(tokens, stream(key, "policy", i))
        noise = model.noise(stream(key, "flow_noise", i), ids)
        tokens, latent = model.predict(tokens, chunk.actions, chunk.num_actions, robot_id, noise, sampler)
        return tokens, Imagined(tokens, latent, chunk)

    return jax.lax.scan(step, start, (jnp.arange(steps), chunks))[1]
