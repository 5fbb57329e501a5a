"""Rollouts that grow by a row: full chunks are evaluation's, a chunk under way is one prediction from its start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.imagination import Chunk, advance, imagine
from rlawm_jax.rng import stream
from tests.interactive.tiny import ROWS, SAMPLER, WIDTH, tiny_model, tiny_rollout
from tests.tiny_models import run, tokens

ROBOT, DRAW = 2, 5
WHO = {"robot_id": jnp.array([ROBOT], jnp.int32), "ids": jnp.array([DRAW], jnp.uint32)}


@pytest.fixture(scope="module")
def rollout():
    return tiny_rollout()


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).uniform(-1, 1, (3 * ROWS, WIDTH)).astype(np.float32)


@functools.cache
def jitted_advance():
    return jax.jit(lambda tokens, chunk, key: advance(tiny_model(), tokens, chunk, key, sampler=SAMPLER, **WHO)[0])


def grown(rollout, rows, start=None):
    """The moment after each row."""
    moments = [rollout.begin(tokens(1)[0] if start is None else start)]
    for row in rows:
        moments.append(rollout.step(moments[-1], row, robot_id=ROBOT, draw=DRAW))
    return moments


def test_after_every_full_chunk_the_tokens_are_those_of_imagine(rollout, rows):
    chunks = Chunk(jnp.asarray(rows.reshape(3, 1, ROWS, WIDTH)), jnp.full((3, 1), ROWS, jnp.int32))
    expected = imagine(tiny_model(), tokens(1), chunks, rollout.key, sampler=SAMPLER, **WHO).tokens[:, 0]
    ends = [moment.tokens for moment in grown(rollout, rows)[ROWS::ROWS]]
    np.testing.assert_allclose(ends, expected, rtol=1e-4, atol=1e-4)  # a scan rounds otherwise
    assert np.abs(ends[1] - ends[0]).mean() > 100 * 1e-4


def test_within_a_chunk_the_tokens_are_one_prediction_from_its_start_with_its_noise(rollout, rows):
    before, *_, now = grown(rollout, rows[: ROWS + 2])[ROWS:]
    chunk = Chunk(np.zeros((1, ROWS, WIDTH), np.float32), np.array([2], np.int32))
    chunk.actions[0, :2] = rows[ROWS : ROWS + 2]
    key = stream(rollout.key, "flow_noise", 1)
    expected = jitted_advance()(before.tokens[None], chunk, key)
    np.testing.assert_allclose(now.tokens, expected[0], rtol=1e-4, atol=1e-4)


def test_a_growing_chunk_keeps_its_noise_and_the_next_draws_its_own(rollout):
    # a model that reads no actions and always starts from the same tokens differs by noise alone
    start = tokens(1)[0]
    steps = [rollout.step(rollout.begin(start), np.zeros(WIDTH), robot_id=-1, draw=DRAW)]
    steps.append(rollout.step(steps[0], np.ones(WIDTH), robot_id=-1, draw=DRAW))
    np.testing.assert_array_equal(steps[0].tokens, steps[1].tokens)
    other_chunk = rollout.step(rollout.begin(start)._replace(chunk=1), np.zeros(WIDTH), robot_id=-1, draw=DRAW)
    other_draw = rollout.step(rollout.begin(start), np.zeros(WIDTH), robot_id=-1, draw=DRAW + 1)
    for other in (other_chunk, other_draw):
        assert np.abs(other.tokens - steps[0].tokens).max() > 1e-3


def test_all_steps_are_one_compiled_program(rollout, rows):
    grown(rollout, rows)
    assert rollout._predict._cache_size() == 1


def test_a_narrow_robots_rows_are_padded(rollout):
    start = rollout.begin(tokens(1)[0])
    narrow = rollout.step(start, np.array([0.5, -0.5]), robot_id=0)
    wide = rollout.step(start, np.array([0.5, -0.5, 0.0]), robot_id=0)
    np.testing.assert_array_equal(narrow.tokens, wide.tokens)


def test_the_row_just_given_stands_in_for_the_one_at_the_last_frame(rows):
    rollout = tiny_rollout(last_action=True)
    now = grown(rollout, rows[:2])[-1]
    chunk = Chunk(np.zeros((1, ROWS + 1, WIDTH), np.float32), np.array([3], np.int32))
    chunk.actions[0, :3] = rows[[0, 1, 1]]
    key = stream(rollout.key, "flow_noise", 0)
    expected = jitted_advance()(tokens(1), chunk, key)
    np.testing.assert_allclose(now.tokens, expected[0], rtol=1e-4, atol=1e-4)


def test_a_picture_is_the_decoded_image_in_whole_steps(rollout):
    some = tokens(1)[0]
    expected = 255 * np.asarray(run(tiny_model(), some[None], method="decode"))[0]
    picture = rollout.decode(some)
    assert picture.dtype == np.uint8
    assert np.abs(picture - expected).max() <= 0.5 + 1e-2
