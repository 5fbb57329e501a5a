"""Rollouts in imagination: the scan equals a loop of predictions, and the steps of the environment of RL."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, imagine
from rlawm_jax.rl.demonstrations import Demonstrations, build_bank
from rlawm_jax.rl.env import EnvSpec, ImaginationEnv
from rlawm_jax.rng import stream
from rlawm_jax.sharding import make_mesh
from tests.tiny_models import LATENT, TOKEN_WIDTH, TOKENS, tiny_world, tokens

B, STEPS = 3, 3
SAMPLER = Sampler("euler", 2)
START, ROBOTS, IDS = tokens(B), np.asarray([0, 2, 0]), np.asarray([5, 1, 8])
KEY = jax.random.key(0)
rng = np.random.default_rng(1)
CHUNKS = Chunk(
    jnp.asarray(rng.normal(size=(STEPS, B, 5, 3)), jnp.float32), jnp.asarray(rng.integers(1, 6, (STEPS, B)), jnp.int32)
)
GRAPHDEF, STATE = nnx.split(tiny_world())
# float32 sums fused in another order, carried through three predictions of unit scale
CLOSE = {"rtol": 0, "atol": 1e-4}


@chex.assert_max_traces(n=1)
def _recorded(state, start, chunks, key, robots, ids):
    model = nnx.merge(GRAPHDEF, state)
    return imagine(model, start, chunks, key, robot_id=robots, ids=ids, sampler=SAMPLER)


recorded = jax.jit(_recorded)


def rollout(start=START, chunks=CHUNKS, key=KEY, robots=ROBOTS, ids=IDS):
    return recorded(STATE, start, chunks, key, robots, ids)


@jax.jit
def predict(state, start, chunk, key, i, robots, ids):
    model = nnx.merge(GRAPHDEF, state)
    return model.predict(start, *chunk, robots, model.noise(stream(key, "flow_noise", i), ids), SAMPLER)


def test_scan_equals_a_python_loop_of_predictions():
    imagined, state = rollout(), START
    assert imagined.tokens.shape == (STEPS, B, TOKENS, TOKEN_WIDTH)
    assert imagined.latents.shape == (STEPS, B, *LATENT)
    for i in range(STEPS):
        chunk = jax.tree.map(lambda leaf, i=i: leaf[i], CHUNKS)
        state, latent = predict(STATE, state, chunk, KEY, i, ROBOTS, IDS)
        np.testing.assert_allclose(imagined.tokens[i], state, **CLOSE)
        np.testing.assert_allclose(imagined.latents[i], latent, **CLOSE)


def test_the_environment_of_reinforcement_learning_takes_the_same_steps():
    model, size = nnx.merge(GRAPHDEF, STATE), CHUNKS.actions.shape[2]
    frames = np.random.default_rng(2).normal(size=(B * 4 * size, TOKENS, TOKEN_WIDTH)).astype(np.float32)
    recorded = Demonstrations(np.full(B, 4 * size), ROBOTS, frames.shape[1:], read=lambda which: frames[which])
    bank = build_bank(recorded, "bfloat16", make_mesh(-1, 1, 1))
    env = ImaginationEnv(EnvSpec(chunk=size, max_chunks=STEPS, sampler=SAMPLER))
    state = env.at(model, bank, jnp.arange(B), jnp.zeros(B, jnp.int32))
    # an environment knows whole chunks alone
    imagined = rollout(np.asarray(state.tokens), CHUNKS._replace(num_actions=jnp.full_like(CHUNKS.num_actions, size)))
    for i in range(STEPS):
        state, _ = env.step(model, bank, state, CHUNKS.actions[i], stream(KEY, "flow_noise", i), IDS)
        np.testing.assert_allclose(state.tokens, imagined.tokens[i], **CLOSE)


def test_noise_is_keyed_by_id_and_step_not_by_place_in_the_batch():
    plain, order = rollout(), np.asarray([2, 0, 1])
    chunks = jax.tree.map(lambda leaf: leaf[:, order], CHUNKS)
    moved = rollout(START[order], chunks, robots=ROBOTS[order], ids=IDS[order])
    np.testing.assert_allclose(moved.tokens, plain.tokens[:, order], **CLOSE)
    renamed = rollout(ids=np.asarray([5, 1, 9]))
    differs = np.abs(renamed.latents - plain.latents).max(axis=(0, 2, 3)) > 1e-3
    assert differs.tolist() == [False, False, True]


def test_rollouts_of_one_shape_are_traced_once():
    # `recorded` allows one trace in all, the calls of the tests above included
    first = rollout(start=START + 1)
    other = rollout(chunks=CHUNKS._replace(actions=-CHUNKS.actions), key=jax.random.key(1), ids=IDS + 1)
    assert first.tokens.shape == other.tokens.shape
