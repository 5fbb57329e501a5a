"""Flow matching against closed-form results: the path's derivative, solvers' orders, the flow of a Gaussian."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax import flow


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X0, NOISE = draw(4, 3, 2) * 2 + 1, draw(4, 3, 2, seed=1)


def solve(velocity, noise, steps, solver):
    return jax.jit(lambda noise: flow.sample(velocity, noise, steps, solver))(noise)


def test_path_runs_from_data_with_a_trace_of_noise_to_pure_noise():
    # float32 rounding of numbers of a few units
    np.testing.assert_allclose(flow.interpolate(X0, NOISE, jnp.zeros(4)), X0 + 1e-5 * NOISE, rtol=0, atol=1e-6)
    np.testing.assert_allclose(flow.interpolate(X0, NOISE, jnp.ones(4)), NOISE, rtol=0, atol=1e-6)
    wide = flow.interpolate(X0, NOISE, jnp.zeros(4), sigma_min=0.5)
    np.testing.assert_allclose(wide, X0 + 0.5 * NOISE, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma_min", [flow.SIGMA_MIN, 0.3])
def test_velocity_target_is_the_derivative_of_the_path_at_every_time(sigma_min):
    times = jnp.asarray([0.0, 0.2, 0.7, 1.0])
    _, slope = jax.jvp(lambda t: flow.interpolate(X0, NOISE, t, sigma_min), (times,), (jnp.ones(4),))
    np.testing.assert_allclose(slope, flow.velocity_target(X0, NOISE, sigma_min), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 30])
def test_euler_is_exact_on_a_straight_path(steps):
    velocity = flow.velocity_target(X0, NOISE)
    end = solve(lambda x, t: velocity, NOISE, steps, "euler")
    # 30 float32 additions of numbers of a few units
    np.testing.assert_allclose(end, X0 + 1e-5 * NOISE, rtol=0, atol=1e-5)


# dx/dt = t: Euler sees t = 1, 1 - 1/n, ..., 1/n, of mean (n + 1) / 2n; the others are exact on it
@pytest.mark.parametrize(("solver", "integral"), [("euler", 5 / 8), ("midpoint", 1 / 2), ("heun", 1 / 2)])
def test_steps_are_equal_and_run_from_one_down_to_zero(solver, integral):
    end = solve(lambda x, t: jnp.broadcast_to(t[:, None, None], x.shape), NOISE, 4, solver)
    np.testing.assert_allclose(end, NOISE - integral, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    # dx/dt = (1 + t) x, so x(0) = x(1) exp(-3/2)
    def error(steps):
        end = solve(lambda x, t: (1 + t)[:, None, None] * x, NOISE, steps, solver)
        return float(jnp.abs(end - NOISE * math.exp(-1.5)).max())

    # the next term of the error shifts the measured order by a few per cent at 12 steps
    assert math.log2(error(12) / error(24)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_velocity_is_traced_once_per_evaluation_of_one_step_however_many_steps(solver, calls):
    seen = []

    def velocity(x, t):
        seen.append(t.shape)
        return x

    jax.eval_shape(lambda x: flow.sample(velocity, x, 30, solver), NOISE)
    assert seen == [(4,)] * calls


def test_exact_velocity_of_a_gaussian_carries_noise_to_that_gaussian():
    mean, std, sigma = 3.0, 0.5, flow.SIGMA_MIN

    def velocity(x, t):
        """E[velocity_target | x_t = x] where x0 ~ N(mean, std)."""
        t = t[:, None, None]
        noise_level = sigma + (1 - sigma) * t
        variance = ((1 - t) * std) ** 2 + noise_level**2
        surprise = (x - (1 - t) * mean) / variance
        return (1 - sigma) * noise_level * surprise - (mean + (1 - t) * std**2 * surprise)

    noise = draw(512, 4, 2)
    end = solve(velocity, noise, 64, "heun")
    # in one dimension the flow keeps the order of points, so it is the affine map; the rest is the solver's error
    np.testing.assert_allclose(end, mean + std * noise, rtol=0, atol=5e-3)
    assert float(end.mean()) == pytest.approx(mean, abs=4 * std / 64)
    assert float(end.std()) == pytest.approx(std, rel=0.05)
    # from zero noise, one step gives the mean
    first = solve(velocity, flow.MEAN.temperature * noise, flow.MEAN.steps, flow.MEAN.solver)
    np.testing.assert_allclose(first, np.full_like(noise, mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["logit_normal", "uniform"])
def test_training_times_follow_their_distribution(schedule):
    count = 20_000
    times = np.sort(np.asarray(flow.sample_times(jax.random.key(0), (4, count // 4), schedule)).ravel())
    assert 0 < times[0] < times[-1] < 1
    if schedule == "uniform":
        expected = times
    else:
        logits = np.log(times / (1 - times))
        expected = np.asarray([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in logits])
    # Kolmogorov-Smirnov at 1 %
    assert np.abs(np.arange(1, count + 1) / count - expected).max() < 1.63 / math.sqrt(count)


def test_unknown_names_and_empty_loops_are_refused():
    with pytest.raises(ValueError, match="solver: expected one of euler, midpoint, heun, found 'rk4'"):
        flow.sample(lambda x, t: x, NOISE, 4, "rk4")
    with pytest.raises(ValueError, match=r"config\.sampler\.steps: expected at least 1, found 0"):
        flow.sample(lambda x, t: x, NOISE, 0)
    with pytest.raises(ValueError, match="expected logit_normal or uniform, found 'cosine'"):
        flow.sample_times(jax.random.key(0), (4,), "cosine")
