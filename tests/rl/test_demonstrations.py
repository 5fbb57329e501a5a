"""The demonstration bank: what it holds, what it costs, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.rl.demonstrations import Demonstrations, bank_spec, build_bank, frame_bytes, lookup, plan
from rlawm_jax.sharding import make_mesh
from tests.rl.toy import ToyWorld

LENGTHS = np.array([3, 5, 2])


def demos(shape=(4, 6)) -> tuple[np.ndarray, Demonstrations]:
    tokens = np.random.default_rng(0).normal(size=(10, *shape)).astype(np.float32)
    return tokens, Demonstrations(LENGTHS, np.array([0, 1, 0]), shape, lambda which: tokens[np.asarray(which)])


@pytest.mark.parametrize(("store", "error"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_every_frame_of_every_episode_is_found_again(store, error):
    tokens, given = demos()
    bank = build_bank(given, store, make_mesh(-1, 1, 1))
    episode = np.repeat(np.arange(3), LENGTHS)
    frame = np.concatenate([np.arange(n) for n in LENGTHS])
    found = lookup(bank, None, jnp.asarray(episode), jnp.asarray(frame))
    largest = np.abs(tokens).max(axis=-1, keepdims=True)
    assert (np.abs(found - tokens) <= error * largest * 1.001).all()
    assert np.abs(found - tokens).max() > 0  # the error is really there, and really that small


def test_pictures_are_stored_as_they_are_and_encoded_at_lookup():
    pictures = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 3), np.uint8)
    given = Demonstrations(LENGTHS, np.zeros(3, int), (1, 1, 3), lambda which: pictures[np.asarray(which)])
    bank = build_bank(given, "frames", make_mesh(-1, 1, 1))
    assert bank.data.dtype == jnp.uint8
    found = lookup(bank, ToyWorld(), jnp.array([1]), jnp.array([4]))
    np.testing.assert_allclose(found[0, 0], pictures[7, 0, 0] / 255, rtol=1e-6)


@pytest.mark.parametrize(("store", "shape"), [("bfloat16", (4, 6)), ("int8", (4, 6)), ("frames", (2, 2, 3))])
def test_a_bank_is_what_its_spec_says(store, shape):
    given = dataclasses.replace(demos(shape)[1], read=lambda which: np.ones((len(which), *shape), np.uint8))
    bank = build_bank(given, store, mesh := make_mesh(-1, 1, 1))
    spec = bank_spec(shape, store, mesh, frames=10, episodes=3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), bank) == jax.tree.map(lambda x: (x.shape, x.dtype), spec)


def test_the_arithmetic_is_that_of_the_arrays():
    _, given = demos()
    for store in ("bfloat16", "int8"):
        bank = build_bank(given, store, make_mesh(-1, 1, 1))
        held = bank.data.nbytes + (0 if bank.scale is None else bank.scale.nbytes)
        assert held == 10 * frame_bytes(given.shape, store)


@pytest.mark.parametrize("store", ["bfloat16", "int8"])
def test_a_loop_of_lookups_does_not_unpack_the_whole_bank(store):
    lengths, shape = np.array([300, 200]), (16, 32)
    given = Demonstrations(lengths, np.zeros(2, int), shape, lambda which: np.zeros((len(which), *shape), np.float32))
    bank = build_bank(given, store, make_mesh(-1, 1, 1))

    def walk(bank, episode):
        def step(total, frame):
            return total + lookup(bank, None, episode, frame), None

        return jax.lax.scan(step, jnp.zeros((2, *shape)), jnp.arange(200).reshape(100, 2))[0]

    compiled = jax.jit(walk).lower(bank, jnp.arange(2)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < bank.data.nbytes / 2


def test_the_plan_says_the_numbers_and_refuses_a_bank_too_large_before_reading():
    _, given = demos()
    unread = dataclasses.replace(given, read=lambda which: pytest.fail("nothing may be read"))
    mesh = make_mesh(-1, 1, 1)
    assert "3 episodes, 10 frames x 48 bytes (4 x 6 as bfloat16)" in plan(unread, "bfloat16", mesh, 1.0)
    with pytest.raises(ValueError, match=r"10 frames x 48 bytes.*at most config\.bank\.limit_gib = 1e-07 GiB"):
        plan(unread, "bfloat16", mesh, 1e-7)
    with pytest.raises(ValueError, match=r"config\.bank\.store: expected one of bfloat16, int8, frames, found 'f64'"):
        plan(unread, "f64", mesh, 1.0)
