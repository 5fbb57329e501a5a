"""The pathwise learner in a world whose gradients are known: what is differentiated, where it ends, what it learns."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import rl
from rlawm_jax.rl.demonstrations import build_bank
from rlawm_jax.rl.env import ImaginationEnv
from rlawm_jax.rl.learner import Frozen, jit_run, make_policy_optimizer, state_shardings
from rlawm_jax.rl.pathwise import PathwiseLearner, PathwiseSpec, PathwiseState
from rlawm_jax.sharding import make_mesh
from tests.rl.test_ppo_learner import exact_base_score, learn, score
from tests.rl.toy import SPEC, ToyPolicy, ToyWorld, demonstrations, toy_trainable

ENVS = 32
SPECS = PathwiseSpec(remat=False)


def make(seed: int = 0, *, rate: float = 0.1, spec: PathwiseSpec = SPECS, world=None, mesh=None, **changes):
    """(learner, state, frozen) on the toy world; `changes` go to the environment's rules or to the learner."""
    mesh = mesh or make_mesh(1, 1, 1, jax.devices()[:1])
    policy, params, rest = nnx.split(ToyPolicy(), toy_trainable, ...)
    model, weights = nnx.split(world or ToyWorld(noise=0.01))
    rules = {k: v for k, v in changes.items() if hasattr(SPEC, k)}
    settings = rl.get_config().pathwise
    settings.update({"learning_rate": rate, "critic_learning_rate": 0.03})
    learner = PathwiseLearner(
        policy=policy,
        model=model,
        env=ImaginationEnv(dataclasses.replace(SPEC, **rules)),
        pathwise=spec,
        tx=make_policy_optimizer(settings, "policy"),
        critic_tx=make_policy_optimizer(settings, "critic"),
        num_envs=ENVS,
        seed=seed,
        **{"num_steps": 2} | {k: v for k, v in changes.items() if k not in rules},
    )
    frozen = Frozen(rest, weights, build_bank(demonstrations(), "bfloat16", mesh))
    return learner, learner.init(params, frozen), frozen


def with_critic(learner, params: nnx.State, rest: nnx.State, *weights: float) -> nnx.State:
    """The parameters with a critic that weighs the point's three channels and 1."""
    policy = nnx.merge(learner.policy, jax.tree.map(jnp.copy, params), rest)
    policy.critic[...] = jnp.array(weights)[:, None]
    return nnx.split(policy, toy_trainable, ...)[1]


def gradient(learner, state: PathwiseState, frozen: Frozen):
    return jax.jit(jax.grad(learner.objective, has_aux=True))(state.params, state, frozen)[0]


@pytest.mark.parametrize("critic", [True, False])
def test_it_reaches_95_percent_of_the_known_optimum(critic):
    learner, state, frozen = make(spec=dataclasses.replace(SPECS, critic=critic))
    noise_free = dataclasses.replace(learner, model=nnx.split(ToyWorld())[0])
    before = score(noise_free, state.params, frozen)
    np.testing.assert_allclose(before, exact_base_score(learner), rtol=0.02)  # the bank is bfloat16
    state, metrics = learn(learner, state, frozen, 60)
    after = score(noise_free, state.params, frozen)
    assert after > 0.05 * before, (before, after, jax.tree.map(lambda x: x[-1], metrics))  # the optimum is 0


def test_a_reward_of_the_wrong_sign_makes_it_worse():
    learner, state, frozen = make(reward_scale=-5.0)
    right = make()[0]
    before = score(right, state.params, frozen)
    state, _ = learn(learner, state, frozen, 20)
    assert score(right, state.params, frozen) < 1.5 * before


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradients_are_finite_differences_in_float64(steps):
    """Across ends of episodes too: five chunks of episodes of at most three."""
    with jax.enable_x64(True):
        learner, state, frozen = make(num_steps=steps, world=ToyWorld(noise=0.1))
        wide = partial(jax.tree.map, lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x)
        state, frozen = wide(state), wide(frozen)
        target = with_critic(learner, state.target, frozen.policy, 0.7, -0.4, 0.2, 0.1)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), state.params)
        state = state._replace(params=params, target=target)
        exact = gradient(learner, state, frozen)
        objective = jax.jit(lambda p: learner.objective(p, state, frozen)[0])
        for _ in range(3):
            direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
            ends = [objective(jax.tree.map(lambda p, d, e=e: p + e * d, params, direction)) for e in (1e-5, -1e-5)]
            slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (exact, direction)), strict=True))
            assert abs(slope) > 1e-3
            np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6)


def test_a_window_ends_where_it_says():
    """Without critic the second chunk's reward counts only in windows of two, and more of the error then moves."""
    alone = dataclasses.replace(SPECS, critic=False, gamma=1.0)
    norms = {}
    for steps in (1, 2):
        learner, state, frozen = make(num_steps=steps, spec=alone, world=ToyWorld(), initial_prob=1.0)
        value, (window, _) = jax.jit(learner.objective)(state.params, state, frozen)
        np.testing.assert_allclose(value, window.reward.sum(axis=0).mean(), rtol=1e-5)
        norms[steps] = optax.global_norm(gradient(learner, state, frozen)["mean"])
    # errors add up: the bias after one chunk is seen once, then doubled, by actions that each count for both
    assert norms[2] > 2 * norms[1]


def test_the_target_critic_stands_for_what_follows_except_after_termination():
    learner, state, frozen = make(num_steps=3, reward_scale=0.0)
    saying_one = with_critic(learner, state.target, frozen.policy, 0.0, 0.0, 0.0, 1.0)
    objective = jax.jit(learner.objective)
    value, (window, _) = objective(state.params, state._replace(target=saying_one), frozen)
    gamma, expected = learner.pathwise.gamma, np.zeros(ENVS)
    assert window.terminated.any() and window.truncated.any()
    for env in range(ENVS):
        age = 0
        for i in range(3):
            age += 1
            done, cut = window.terminated[i, env], window.truncated[i, env]
            if cut or (i == 2 and not done):
                expected[env] += gamma**age
            age = 0 if done or cut else age
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(window.next_value, 1.0)
    # the trained critic itself has no say
    own = with_critic(learner, state.params, frozen.policy, 0.0, 0.0, 0.0, 1.0)
    assert objective(own, state, frozen)[0] == 0.0


def test_the_value_of_a_state_moves_the_actions_that_led_there():
    learner, state, frozen = make(num_steps=1, reward_scale=0.0)
    rising = with_critic(learner, state.target, frozen.policy, 1.0, 0.0, 0.0, 0.0)
    towards = gradient(learner, state._replace(target=rising), frozen)
    bias = np.asarray(towards["mean"].get_value()[3]).reshape(-1, 3)
    assert (bias[:, 0] > 0).all() and np.abs(bias[:, 1:]).max() < 1e-6


def test_the_critic_learns_what_is_still_to_come():
    """At gamma 0 that is the chunk's own reward; at 0.9 it is several of them."""
    means = {}
    for gamma in (0.0, 0.9):
        spec = dataclasses.replace(SPECS, gamma=gamma)
        learner, state, frozen = make(rate=0.0, spec=spec, world=ToyWorld())
        state, _ = learn(learner, state, frozen, 60)
        window = jax.jit(learner.objective)(state.params, state, frozen)[1][0]
        policy = nnx.merge(learner.policy, state.params, frozen.policy)
        means[gamma] = float(policy.value(window.features.reshape(2 * ENVS, -1)).mean() / window.reward.mean())
    np.testing.assert_allclose(means[0.0], 1.0, atol=0.2)
    assert means[0.9] > 1.5, means


def test_policy_and_critic_move_at_their_own_rates_and_the_target_follows():
    learner, state, frozen = make(rate=0.0)
    after, _ = learn(learner, state, frozen, 2)
    first, _ = learn(learner, state, frozen, 1)
    followed = learner.pathwise.target_decay * state.target.critic[...] + 0.2 * first.params.critic[...]
    np.testing.assert_allclose(first.target.critic[...], followed, rtol=1e-5)
    moved = {name: bool((after.params[name][...] != state.params[name][...]).any()) for name in state.params}
    assert moved == {"critic": True, "mean": False, "std": False}


def test_recomputing_chunks_changes_no_gradient():
    gradients = []
    for remat in (False, True):
        learner, state, frozen = make(num_steps=3, spec=dataclasses.replace(SPECS, remat=remat))
        gradients.append(gradient(learner, state, frozen))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_one_iteration_is_one_program_traced_once_and_nothing_leaves_the_device():
    traces = []
    learner, state, frozen = make(on_trace=lambda: traces.append(1))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    step = jit_run(learner, state, frozen, mesh, 1)
    state = jax.device_put(state, state_shardings(state, mesh))
    state, _ = step(state, frozen)
    traced = len(traces)
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, metrics = step(state, frozen)
    assert len(traces) == traced and int(state.iteration) == 6 and np.isfinite(metrics["reward"]).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gamma", 1.5, r"config\.pathwise\.gamma: expected a number in \[0, 1\], found 1\.5"),
        ("critic_updates", 0, r"config\.pathwise\.critic_updates: expected 1 or more, found 0"),
    ],
)
def test_a_setting_that_means_nothing_names_its_key(field, value, message):
    with pytest.raises(ValueError, match=message):
        PathwiseSpec(**{field: value})
