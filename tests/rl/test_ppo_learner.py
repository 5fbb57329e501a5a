"""The learner on a world whose best policy is known, and its promises about compilation, transfers and devices."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlawm_jax.rl.demonstrations import build_bank
from rlawm_jax.rl.env import ImaginationEnv
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.learner import Frozen, frozen_shardings, jit_run, state_shardings
from rlawm_jax.rl.ppo import PPOSpec, log_prob
from rlawm_jax.rl.ppo_learner import PPOLearner, PPOState
from rlawm_jax.sharding import make_mesh
from tests.rl.toy import BIAS, CHUNK, EPISODES, SPEC, ToyPolicy, ToyWorld, demonstrations, toy_trainable

PPO = PPOSpec(gamma=0.9, epochs=4, minibatch=64)
ENVS, STEPS = 64, 4


def make(seed: int = 0, *, rate: float = 0.02, ppo: PPOSpec = PPO, world=None, mesh=None, **changes):
    """(learner, state, frozen) on the toy world; `changes` go to the environment's rules or to the learner."""
    mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
    policy, params, rest = nnx.split(ToyPolicy(), toy_trainable, ...)
    model, weights = nnx.split(world or ToyWorld(noise=0.01))
    rules = {k: v for k, v in changes.items() if hasattr(SPEC, k)}
    learner = PPOLearner(
        policy=policy,
        model=model,
        env=ImaginationEnv(dataclasses.replace(SPEC, **rules)),
        ppo=ppo,
        tx=optax.adam(rate),
        num_envs=ENVS,
        seed=seed,
        **{"num_steps": STEPS} | {k: v for k, v in changes.items() if k not in rules},
    )
    frozen = Frozen(rest, weights, build_bank(demonstrations(), "bfloat16", mesh))
    return learner, learner.init(params, frozen), frozen


def learn(learner: PPOLearner, state: PPOState, frozen: Frozen, iterations: int):
    return jax.jit(partial(learner.run, iterations=iterations))(state, frozen)


def score(learner: PPOLearner, params, frozen: Frozen) -> float:
    """Mean imagined return of the mean actions from every demonstration's first frame."""
    episodes = jnp.arange(EPISODES, dtype=jnp.int32)
    found = jax.jit(learner.returns)(params, frozen, episodes, jnp.zeros_like(episodes), jax.random.key(9))
    return float(found["return"].mean())


def exact_base_score(learner: PPOLearner) -> float:
    """-5 mean(bias^2) after one chunk; the errors of three chunks add up: 1 + 4 + 9."""
    return -5 * np.square(BIAS).mean() * (1 + 4 + 9)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_ppo_reaches_95_percent_of_the_known_optimum(seed):
    learner, state, frozen = make(seed)
    noise_free = dataclasses.replace(learner, model=nnx.split(ToyWorld())[0])
    before = score(noise_free, state.params, frozen)
    np.testing.assert_allclose(before, exact_base_score(learner), rtol=0.02)  # the bank is bfloat16
    state, metrics = learn(learner, state, frozen, 60)
    after = score(noise_free, state.params, frozen)
    assert after > 0.05 * before, (before, after, jax.tree.map(lambda x: x[-1], metrics))  # the optimum is 0


@pytest.mark.slow
def test_reinforce_without_a_critic_learns_too():
    learner, state, frozen = make(ppo=dataclasses.replace(PPO, critic=False))
    before = score(learner, state.params, frozen)
    state, _ = learn(learner, state, frozen, 60)
    assert score(learner, state.params, frozen) > 0.3 * before


def test_a_reward_of_the_wrong_sign_makes_it_worse():
    learner, state, frozen = make(reward_scale=-5.0)
    right = make()[0]
    before = score(right, state.params, frozen)
    state, _ = learn(learner, state, frozen, 30)
    assert score(right, state.params, frozen) < 1.5 * before


def test_a_group_starts_together_and_sees_the_same_noise():
    learner, state, frozen = make(world=ToyWorld(noise=0.3), group_size=4)
    for name in ("episode", "frame"):
        grouped = np.asarray(getattr(state.env, name)).reshape(-1, 4)
        assert (grouped == grouped[:, :1]).all() and len(np.unique(grouped)) > 1
    _, rollout = jax.jit(learner._rollout)(state, frozen)
    actions = np.asarray(rollout.action[0]).reshape(-1, 4, 3 * CHUNK)
    assert (actions[:, 0] != actions[:, 1]).all()
    moved = np.asarray(rollout.observation[1] - rollout.observation[0])[:, 0, 0].reshape(-1, 4, 3)
    noise = moved - actions.reshape(-1, 4, CHUNK, 3).sum(axis=2)
    going_on = ~np.asarray(rollout.outcome.done[0]).reshape(-1, 4)[:, 0]
    np.testing.assert_allclose(noise[going_on], noise[going_on][:, :1].repeat(4, 1), atol=1e-6)
    assert noise[going_on].std() > 0.2


class Glare(ToyWorld):
    """A world whose third channel is noise that no action changes: it moves rewards and says nothing about actions."""

    def predict(self, tokens, actions, num_actions, robot_id, noise, sampler):
        moved, _ = super().predict(tokens, actions, num_actions, robot_id, jnp.zeros_like(noise), sampler)
        return moved.at[..., 2].set(self.noise_scale * noise[..., 2]), noise


@pytest.mark.slow
def test_groups_learn_where_noise_drowns_single_environments():
    no_critic, left = dataclasses.replace(PPO, critic=False), {}
    for size in (1, 8):
        learner, state, frozen = make(world=Glare(noise=1.0), group_size=size, ppo=no_critic)
        quiet = dataclasses.replace(learner, model=nnx.split(Glare())[0])
        before = score(quiet, state.params, frozen)
        state, _ = learn(learner, state, frozen, 30)
        left[size] = score(quiet, state.params, frozen) / before  # of the clone's loss
    assert left[8] < 0.02 and left[8] < 0.1 * left[1], left


def test_a_rollout_explores_with_the_noise_whose_density_it_stores():
    correlation = 0.9
    smooth = dataclasses.replace(PPO, exploration=Exploration(CHUNK, correlation))
    learner, state, frozen = make(rate=0.0, ppo=smooth, num_steps=16)
    _, rollout = jax.jit(learner._rollout)(state, frozen)
    policy = nnx.merge(learner.policy, state.params, frozen.policy)
    looks, actions = (x.reshape(-1, *x.shape[2:]) for x in (rollout.observation, rollout.action))
    mean, std = policy.distribution(policy.features(looks))
    rows = np.asarray((actions - mean) / std).reshape(-1, CHUNK, 3)
    found = np.corrcoef(rows[:, 0].ravel(), rows[:, 1].ravel())[0, 1]
    np.testing.assert_allclose(found, correlation, atol=0.03)  # of 3072 pairs: a standard error of 0.004
    np.testing.assert_allclose(
        rollout.log_prob.ravel(), log_prob(actions, mean, std, smooth.exploration), rtol=1e-4, atol=1e-3
    )
    _, metrics = learn(learner, state, frozen, 1)
    assert metrics["kl"][0] < 1e-6  # the update's density is the rollout's: without a step every ratio is 1


def test_a_group_size_that_does_not_divide_the_environments_names_the_field():
    with pytest.raises(ValueError, match=r"config\.ppo\.group_size: expected a divisor of num_envs = 64, found 5"):
        make(group_size=5)


def test_nothing_moves_with_a_zero_learning_rate_and_the_base_never():
    learner, state, frozen = make(rate=0.0)
    after, metrics = learn(learner, state, frozen, 3)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert after.iteration == 3 and (metrics["kl"] < 1e-6).all()
    names = {
        jax.tree_util.keystr(path[:1], simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert names == {"mean", "std", "critic"}  # the base is an input and never an output


@pytest.mark.slow
def test_normalised_rewards_have_about_the_scale_of_their_returns():
    learner, state, frozen = make(normalise_rewards=True)
    _, metrics = learn(learner, state, frozen, 20)
    assert metrics["reward_factor"][-1] > 2  # returns vary by much less than 1 here
    plain = make()[0]
    assert (learn(plain, state, frozen, 2)[1]["reward_factor"] == 1).all()


def test_one_iteration_is_one_program_traced_once_and_nothing_leaves_the_device():
    traces = []
    learner, state, frozen = make(on_trace=lambda: traces.append(1))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    step = jit_run(learner, state, frozen, mesh, 1)
    state = jax.device_put(state, state_shardings(state, mesh))
    frozen = jax.device_put(frozen, frozen_shardings(frozen, mesh))
    state, _ = step(state, frozen)
    traced = len(traces)  # a scan looks at its body more than once
    with jax.transfer_guard("disallow"):
        for _ in range(20):
            state, metrics = step(state, frozen)
    assert len(traces) == traced and step._cache_size() == 1
    assert int(state.iteration) == 21 and np.isfinite(metrics["reward"]).all()


@pytest.mark.slow
def test_iterations_in_one_call_equal_iterations_one_by_one():
    learner, state, frozen = make()
    together, metrics = learn(learner, state, frozen, 4)
    single = jax.jit(partial(learner.run, iterations=1))
    for i in range(4):
        state, one = single(state, frozen)
        np.testing.assert_allclose(one["reward"][0], metrics["reward"][i], rtol=1e-5)
    # two programs of the same arithmetic: float32 rounding, carried through four updates
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.params, together.params)


def test_truncation_is_bootstrapped_and_termination_is_not():
    """With a critic that always says 1 and no reward, targets tell the two ends apart."""
    learner, state, frozen = make(reward_scale=0.0)
    policy = nnx.merge(learner.policy, state.params, frozen.policy)
    policy.critic[...] = jnp.array([[0.0], [0.0], [0.0], [1.0]])
    _, params, _ = nnx.split(policy, toy_trainable, ...)
    _, rollout = jax.jit(learner._rollout)(state._replace(params=params), frozen)
    np.testing.assert_allclose(rollout.next_value, 1.0)
    assert rollout.outcome.terminated.any() and rollout.outcome.truncated.any()
    from rlawm_jax.rl.ppo import gae

    ends = rollout.outcome.terminated, rollout.outcome.truncated
    _, targets = gae(rollout.reward, rollout.value, rollout.next_value, *ends, 0.9, 0.0)
    np.testing.assert_allclose(targets[rollout.outcome.terminated], 0.0, atol=1e-6)
    np.testing.assert_allclose(targets[rollout.outcome.truncated], 0.9, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 8])
def test_the_value_after_a_cut_is_that_of_the_old_episodes_last_state(steps):
    """A critic that reads the first channel of the picture says where the environment stands."""
    learner, state, frozen = make(num_steps=steps)
    policy = nnx.merge(learner.policy, state.params, frozen.policy)
    policy.critic[...] = jnp.array([[1.0], [0.0], [0.0], [0.0]])
    _, params, _ = nnx.split(policy, toy_trainable, ...)
    _, rollout = jax.jit(learner._rollout)(state._replace(params=params), frozen)
    moved = rollout.observation[:, :, 0, 0, 0] + rollout.action.reshape(steps, ENVS, CHUNK, 3)[..., 0].sum(axis=-1)
    going_on = ~np.asarray(rollout.outcome.terminated)
    assert rollout.outcome.truncated.sum() > 10
    # the toy world adds noise of 0.01 to every move
    np.testing.assert_allclose(rollout.next_value[going_on], moved[going_on], atol=0.06)
    assert np.abs(rollout.next_value - moved)[~going_on].max() > 0.1  # an ended episode's next look is another's


def test_minibatches_that_do_not_divide_the_rollout_name_the_field():
    with pytest.raises(ValueError, match=r"config\.ppo\.minibatch: expected a divisor of .* = 256, found 100"):
        make(ppo=dataclasses.replace(PPO, minibatch=100))


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(tmp_path):
    """Environments and bank in eight pieces; sums are taken in another order, hence 1e-4."""
    out = tmp_path / "found.json"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.tools.eight_devices", str(out)]
    result = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for learner, found in json.loads(out.read_text()).items():
        one, eight = found["one"], found["eight"]
        assert eight["pieces"] == {"tokens": 8, "observation": 8, "bank": 8}
        assert one["pieces"] == {"tokens": 1, "observation": 1, "bank": 1}
        for name in one.keys() - {"pieces"}:
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5, err_msg=f"{learner} {name}")
