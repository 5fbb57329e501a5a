"""Advantages against a table computed by hand, and the update's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlawm_jax.rl.ppo import (
    PPOSpec,
    Samples,
    entropy,
    gae,
    leave_one_out,
    log_prob,
    ppo_loss,
    returns_to_go,
    update,
)

GAMMA, LAMBDA = 0.5, 0.5
REWARDS = np.array([[1.0], [2.0], [3.0]], np.float32)
VALUES = np.array([[4.0], [2.0], [1.0]], np.float32)
NEXT = np.array([[2.0], [8.0], [2.0]], np.float32)
NEVER = np.zeros((3, 1), bool)
SECOND = np.array([[False], [True], [False]])


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # delta = 1+1-4, 2+4-2, 3+1-1 = -2, 4, 3; A3 = 3, A2 = 4 + 3/4, A1 = -2 + 4.75/4
        (NEVER, NEVER, [-0.8125, 4.75, 3.0]),
        # the end of the task: no future in the second delta (2 - 2 = 0), nothing comes back over it
        (SECOND, NEVER, [-2.0, 0.0, 3.0]),
        # cut off: the second delta keeps the value of where it was cut (4), but nothing comes back over it
        (NEVER, SECOND, [-1.0, 4.0, 3.0]),
    ],
)
def test_gae_equals_a_hand_computed_table(terminated, truncated, expected):
    advantages, targets = gae(REWARDS, VALUES, NEXT, terminated, truncated, GAMMA, LAMBDA)
    np.testing.assert_allclose(advantages[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(targets, advantages + VALUES, atol=1e-6)


def test_returns_to_go_stop_at_the_end_of_an_episode():
    np.testing.assert_allclose(returns_to_go(REWARDS, SECOND, GAMMA)[:, 0], [2.0, 2.0, 3.0])


def test_a_group_is_compared_with_its_others():
    advantages = np.array([[1.0, 2.0, 6.0, 0.0, 0.0, 3.0]], np.float32)
    # against (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2, then against 3/2, 3/2, 0
    np.testing.assert_allclose(leave_one_out(advantages, 3), [[-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]])
    np.testing.assert_array_equal(leave_one_out(advantages, 1), advantages)
    shifted = advantages + np.repeat([[10.0, -7.0]], 3, axis=1)
    np.testing.assert_allclose(leave_one_out(shifted, 3), leave_one_out(advantages, 3), atol=1e-5)


def test_the_density_is_that_of_a_gaussian():
    rng = np.random.default_rng(0)
    action, mean, std = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.uniform(0.1, 2, size=(5, 3))
    expected = (-0.5 * ((action - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))).sum(1)
    np.testing.assert_allclose(log_prob(action, mean, std), expected, rtol=1e-5)
    drawn = mean[0] + std[0] * rng.normal(size=(200_000, 3))
    monte_carlo = -np.mean(log_prob(drawn, *(np.broadcast_to(x[0], drawn.shape) for x in (mean, std))))
    np.testing.assert_allclose(entropy(std[:1])[0], monte_carlo, atol=0.02)  # 200,000 draws: three sigma


def forward(params, observation):
    mean = jnp.broadcast_to(params["mean"], (len(observation), 2))
    return mean, jnp.full_like(mean, 0.5), observation @ params["value"]


def samples(count: int = 32) -> tuple[dict, Samples]:
    rng = np.random.default_rng(1)
    params = {"mean": jnp.zeros(2), "value": jnp.zeros(3)}
    observation = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    mean, std, _ = forward(params, observation)
    action = mean + std * jnp.asarray(rng.normal(size=mean.shape), jnp.float32)
    drawn = log_prob(action, mean, std)
    return params, Samples(observation, action, drawn, action[:, 0], jnp.asarray(rng.normal(size=count), jnp.float32))


def run(spec: PPOSpec, rate: float, batch: Samples | None = None):
    params, drawn = samples()
    tx = optax.sgd(rate)
    return params, *update(
        params, tx.init(params), batch or drawn, jax.random.key(0), forward=forward, tx=tx, spec=spec
    )


def test_advantages_are_divided_by_the_unbiased_deviation():
    params, drawn = samples(4)
    advantage = np.array([3.0, -1.0, 0.0, 2.0], np.float32)
    # one ratio of 1.1, too small to be clipped: with all at 1 the loss would be 0 whatever the deviation
    drawn = drawn._replace(advantage=jnp.asarray(advantage))
    drawn = drawn._replace(log_prob=drawn.log_prob - jnp.log(jnp.array([1.1, 1.0, 1.0, 1.0])))
    _, metrics = ppo_loss(params, forward, drawn, PPOSpec())
    normalised = (advantage - advantage.mean()) / advantage.std(ddof=1)
    np.testing.assert_allclose(metrics["policy_loss"], -(normalised.sum() + 0.1 * normalised[0]) / 4, rtol=1e-5)


def test_the_update_moves_towards_actions_of_positive_advantage():
    before, after, _, metrics = run(PPOSpec(minibatch=16), 0.05)
    assert after["mean"][0] > before["mean"][0] + 0.01
    assert metrics["stopped"] == 0 and metrics["updates"] == 8
    assert metrics["value_loss"] > 0


def test_a_passed_kl_target_freezes_parameters_from_there_on():
    _, stopped_early, _, metrics = run(PPOSpec(minibatch=16, target_kl=1e-6), 0.05)
    assert metrics["stopped"] == 1 and metrics["updates"] == 1  # the first has the sampling policy: KL 0
    _, once, _, _ = run(PPOSpec(minibatch=16, target_kl=1e-6, epochs=1), 0.05)
    for name in once:
        np.testing.assert_array_equal(stopped_early[name], once[name])


def test_a_kl_that_is_no_number_stops_before_any_update():
    _, drawn = samples()
    before, after, _, metrics = run(PPOSpec(minibatch=16), 0.05, drawn._replace(log_prob=drawn.log_prob * jnp.nan))
    assert metrics["updates"] == 0
    np.testing.assert_array_equal(after["mean"], before["mean"])


def test_clipping_takes_the_gradient_from_samples_that_went_too_far():
    params, drawn = samples()
    far = drawn._replace(log_prob=drawn.log_prob - 1.0)  # every ratio is e
    spec = PPOSpec(minibatch=32, epochs=1, target_kl=1e6, critic=False)
    tx = optax.sgd(1.0)
    # positive advantages only count below the upper clip, negative ones always (the minimum is the pessimist's)
    up = far._replace(advantage=jnp.where(jnp.arange(32) < 16, 1.0, -1.0))
    after, _, metrics = update(params, tx.init(params), up, jax.random.key(0), forward=forward, tx=tx, spec=spec)
    _, std, _ = forward(params, drawn.observation)
    score = drawn.action / jnp.square(std)
    expected = (jnp.e * -np.sqrt(31 / 32) * score[16:]).sum(0) / 32  # 1 over the unbiased deviation of half 1, half -1
    np.testing.assert_allclose(after["mean"], expected, rtol=1e-4)
    assert metrics["clip_fraction"] == 1


def test_without_a_critic_the_value_parameters_rest():
    before, after, _, metrics = run(PPOSpec(minibatch=16, critic=False), 0.05)
    np.testing.assert_array_equal(after["value"], before["value"])
    assert "value_loss" not in metrics


def test_bad_settings_name_their_field():
    with pytest.raises(ValueError, match=r"config\.ppo\.minibatch: expected a divisor of the 32 samples, found 5"):
        run(PPOSpec(minibatch=5), 0.1)
    with pytest.raises(ValueError, match=r"config\.ppo\.minibatch: expected 2 or more, found 1"):
        PPOSpec(minibatch=1)
    with pytest.raises(ValueError, match=r"config\.ppo\.gamma"):
        PPOSpec(gamma=1.5)
    with pytest.raises(ValueError, match=r"config\.ppo\.target_kl"):
        PPOSpec(target_kl=0)
