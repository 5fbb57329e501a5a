"""The probe reads positions from tokens that hold them, and its distance is in the unit of the positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from data.datasets import Datasets
from rlawm_jax.planning import probe

PATCHES, CHANNELS, BODIES = 4, 24, 2


def frames(count, seed):
    """Positions [n, 2, 3], and tokens that hold them in every patch among larger things that do not matter."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-0.3, 0.3, (count, BODIES, 3))
    mixing = np.random.default_rng(0).normal(size=(BODIES * 3 + 5, PATCHES * CHANNELS))
    hidden = np.concatenate([positions.reshape(count, -1), rng.normal(size=(count, 5))], axis=1)
    return (hidden @ mixing + 2.0).reshape(count, PATCHES, CHANNELS).astype(np.float32), positions


def test_positions_are_read_from_new_frames():
    fitted = probe.fit(*frames(400, seed=1))
    tokens, positions = frames(50, seed=2)
    np.testing.assert_allclose(fitted(jnp.asarray(tokens)), positions, rtol=0, atol=0.02)
    assert probe.errors(fitted, tokens, positions).shape == (BODIES,)
    assert probe.errors(fitted, tokens, positions).max() < 0.02
    shuffled = probe.fit(frames(400, seed=1)[0], frames(400, seed=3)[1])
    assert probe.errors(shuffled, tokens, positions).min() > 0.1


def test_the_distance_is_the_sum_over_the_bodies_in_the_unit_of_the_positions():
    fitted = probe.fit(*frames(400, seed=1))
    tokens, positions = frames(2, seed=2)
    expected = np.linalg.norm(positions[0] - positions[1], axis=-1).sum()
    assert float(fitted.distance(jnp.asarray(tokens[0]), jnp.asarray(tokens[1]))) == pytest.approx(expected, abs=0.03)
    batch = fitted.distance(jnp.asarray(tokens)[None], jnp.asarray(tokens)[1])
    assert batch.shape == (1, 2)
    assert float(batch[0, 1]) == pytest.approx(0.0, abs=1e-6)


class Recorded(Datasets):
    """Three episodes whose frames hold (episode, frame), as do the positions recorded beside them."""

    lengths = np.array([5, 9, 7])

    def __init__(self, cached):
        self.stores = {"a:b": self}
        self.caches = {"a:b": self} if cached else {}

    def positions(self, row):
        return np.stack([np.full(self.lengths[row], row), np.arange(self.lengths[row])], axis=1)[:, None].astype(float)

    def frames(self, reference, row, which):
        return np.array([[[[row, frame, 0]]] for frame in which], np.uint8)

    def tokens(self, reference, row, which):
        return np.array([[[row, frame, 1]] for frame in which], np.float16)


@pytest.mark.parametrize("cached", [False, True])
def test_tokens_and_positions_of_a_sample_are_of_the_same_frames_of_the_given_episodes(cached):
    sizes = []

    def encode(frames):
        sizes.append(len(frames))
        return frames[:, 0].astype(np.float32)

    tokens, positions = probe.sample(Recorded(cached), "a:b", np.array([0, 2]), 120, encode, seed=3)
    np.testing.assert_array_equal(tokens[:, 0, :2], positions[:, 0])
    assert set(tokens[:, 0, 2]) == {float(cached)}
    assert set(tokens[:, 0, 0]) == {0.0, 2.0}
    assert sizes == ([] if cached else [50, 50, 20])


def test_without_training_episodes_there_is_no_probe():
    with pytest.raises(ValueError, match=r"a:b: expected training and held-out episodes .* --distance=tokens"):
        probe.sample(Recorded(cached=True), "a:b", np.array([], int), 3, lambda frames: frames, seed=0)
