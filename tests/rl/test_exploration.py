"""Exploration noise: the correlation that it states, its density and entropy as SciPy has them, white as before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from rlawm_jax.rl.exploration import WHITE, Exploration
from rlawm_jax.rl.ppo import entropy, log_prob

ROWS, WIDTH = 8, 2
SMOOTH = Exploration(ROWS, 0.9)
STATED = 0.9 ** np.abs(np.subtract.outer(np.arange(ROWS), np.arange(ROWS)))


def normal(count: int, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), (count, ROWS * WIDTH))


def test_rows_correlate_as_stated_dimensions_do_not_and_every_number_keeps_its_deviation():
    found = np.cov(SMOOTH.colour(normal(40_000)), rowvar=False)
    # the standard error of a covariance is at most sqrt(2 / 40,000) = 0.007
    np.testing.assert_allclose(found, np.kron(STATED, np.eye(WIDTH)), atol=0.03)


def test_density_and_entropy_are_those_of_the_multivariate_normal():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3, ROWS * WIDTH)), rng.uniform(0.05, 0.2, size=(3, ROWS * WIDTH))
    action = mean + std * np.asarray(SMOOTH.colour(normal(3)))
    for i in range(3):
        exact = multivariate_normal(mean[i], np.diag(std[i]) @ np.kron(STATED, np.eye(WIDTH)) @ np.diag(std[i]))
        one = (jnp.asarray(x[i : i + 1], jnp.float32) for x in (action, mean, std))
        np.testing.assert_allclose(log_prob(*one, SMOOTH)[0], exact.logpdf(action[i]), rtol=1e-4)
        np.testing.assert_allclose(entropy(jnp.asarray(std[i : i + 1]), SMOOTH)[0], exact.entropy(), rtol=1e-5)


def test_whitening_undoes_colouring_and_both_leave_white_noise_alone():
    white = normal(5)
    np.testing.assert_allclose(SMOOTH.whiten(SMOOTH.colour(white)), white, atol=1e-5)
    for nothing in (WHITE, Exploration(ROWS)):
        assert nothing.colour(white) is white and nothing.whiten(white) is white and nothing.log_volume(16) == 0


def test_white_noise_has_the_numbers_of_independent_ones_bit_for_bit():
    rng = np.random.default_rng(1)
    action, mean = (jnp.asarray(rng.normal(size=(5, 16)), jnp.float32) for _ in range(2))
    std = jnp.asarray(rng.uniform(0.1, 2, size=(5, 16)), jnp.float32)
    z = (action - mean) / std
    before = -0.5 * (jnp.square(z) + jnp.log(2 * jnp.pi)).sum(axis=-1) - jnp.log(std).sum(axis=-1)
    np.testing.assert_array_equal(log_prob(action, mean, std, Exploration(8)), before)
    np.testing.assert_array_equal(
        entropy(std, Exploration(8)), (0.5 * (1 + jnp.log(2 * jnp.pi)) + jnp.log(std)).sum(-1)
    )


def test_smooth_noise_moves_a_chunks_sum_more_than_white_noise_does():
    white = normal(4000)
    sums = [np.asarray(noise).reshape(-1, ROWS, WIDTH).sum(axis=1).std() for noise in (white, SMOOTH.colour(white))]
    np.testing.assert_allclose(sums[1] / sums[0], np.sqrt(STATED.sum() / ROWS), rtol=0.05)  # 2.5 times


@pytest.mark.parametrize("correlation", [-0.1, 1.0])
def test_a_correlation_without_a_density_names_the_field(correlation):
    with pytest.raises(ValueError, match=r"^config\.ppo\.exploration_correlation: expected a number in \[0, 1\)"):
        Exploration(ROWS, correlation)
