"""Policies: what they see, how rows are scaled, and that the heads of reinforcement learning start as nothing."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.policy import RESIZES, Policy, resized, trainable, with_residual
from rlawm_jax.rl.ppo_learner import PPOLearner
from tests.tiny_models import paths_with_gradient, run
from tests.tiny_policy import fresh_policy, policy_config, random_policy, randomise

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(3, 20, 20, 3)).astype(np.float32)
KINDS = {"bc": {}, "bc_rla": {"policy__rla__enabled": True}}


@pytest.fixture(scope="module", params=KINDS)
def config(request):
    return policy_config(**KINDS[request.param])


@pytest.fixture(scope="module")
def grown(config):
    """A random policy, and what `with_residual` makes of it."""
    policy = random_policy(config)
    return policy, *with_residual(policy, config, nnx.Rngs(1))


def test_a_picture_of_any_size_is_resized_and_one_of_the_right_size_is_not_touched(config):
    policy = random_policy(config)
    small = resized(jnp.asarray(IMAGES), 16, config.policy.resize)
    assert small.shape == (3, 16, 16, 3) and resized(small, 16, config.policy.resize) is small
    np.testing.assert_array_equal(run(policy, IMAGES, method="features"), run(policy, small, method="features"))


@pytest.mark.torch
@pytest.mark.parametrize("before", [12, 47, 64])
@pytest.mark.parametrize("resize", RESIZES)
def test_both_ways_to_resize_are_torchs(resize, before):
    torch = pytest.importorskip("torch")
    images = RNG.uniform(size=(2, before, before, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        (16, 16),
        mode="bilinear",
        align_corners=False,
        antialias=resize == "antialias",
    )
    # float32 rounding of two orders of summation
    np.testing.assert_allclose(resized(images, 16, resize), expected.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_fresh_heads_and_low_rank_branches_change_nothing_at_all(grown, config):
    policy, rl, rl_config = grown
    features = run(policy, IMAGES, method="features")
    np.testing.assert_array_equal(run(rl, IMAGES, method="features"), features)
    base = run(policy, features, method="base_actions")
    np.testing.assert_array_equal(run(rl, features, method="base_actions"), base)
    mean, std = run(rl, features, method="distribution")
    np.testing.assert_array_equal(np.asarray(mean).reshape(3, 3, 2), base[:, :3])
    np.testing.assert_allclose(std, 0.1 * np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(run(rl, features, method="best_actions"), base[:, :3])
    assert run(rl, features, method="value").shape == (3,)
    assert rl_config.policy.residual.enabled and not config.policy.residual.enabled


def test_reinforcement_learning_trains_heads_and_low_rank_branches_and_nothing_else(grown):
    policy, rl, _ = grown
    _, trained, kept = nnx.split(rl, trainable, ...)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)}
    assert all(path.startswith(("residual.", "critic.")) or ".lora." in path for path in paths)
    kept_paths = {path for path, _ in nnx.to_flat_state(kept)}
    assert kept_paths == {path for path, _ in nnx.to_flat_state(nnx.state(policy))}


def test_every_convolution_and_linear_of_the_base_has_a_branch_that_learns(grown):
    _, rl, _ = grown
    graphdef, trained, kept = nnx.split(rl, trainable, ...)

    @jax.jit
    def gradient(trained):
        def loss(trained):
            policy = nnx.merge(graphdef, trained, kept)
            mean, std = policy.distribution(policy.features(jnp.asarray(IMAGES)))
            return jnp.square(mean).sum() + std.sum()

        return jax.grad(loss)(trained)

    moved = paths_with_gradient(gradient(trained))
    branches = {path for path, _ in nnx.iter_modules(rl) if path[-1:] == ("lora",)}
    bases = {path for path, module in nnx.iter_modules(rl) if path[-1:] == ("base",)}
    in_base = {path[:-1] for path in bases if path[0] not in ("residual", "critic")}
    assert {path[:-1] for path in branches} == in_base and len(branches) >= 6
    # B starts at zero: it moves first, and A with it from the second step on
    assert {f"{'.'.join(map(str, path))}.b.kernel" for path in branches} <= moved
    assert "residual.head.base.kernel" in moved


def test_ppos_critic_does_not_move_what_it_looks_at_and_a_value_can_move_actions(grown):
    """PPO's value loss stops at the features; pathwise gradients go through them to what was seen."""
    rl = randomise(grown[1], seed=3)
    graphdef, params, rest = nnx.split(rl, nnx.Param, ...)

    @jax.jit
    def through_ppo(params):
        learner = SimpleNamespace(_merge=lambda params, rest: nnx.merge(graphdef, params, rest))
        return jax.grad(lambda params: PPOLearner._forward(learner, params, rest, jnp.asarray(IMAGES))[2].sum())(params)

    moved = paths_with_gradient(through_ppo(params))
    assert moved and all(path.startswith("critic.") for path in moved)

    @jax.jit
    def through_images(images):
        policy = nnx.merge(graphdef, params, rest)
        return jax.grad(lambda images: policy.value(policy.features(images)).sum())(images)

    assert np.abs(through_images(jnp.asarray(IMAGES))).max() > 0


def test_the_residual_is_bounded_by_its_scale(grown):
    rl = randomise(grown[1], seed=4)
    features = 100 * run(rl, IMAGES, method="features")
    base = np.asarray(run(rl, features, method="base_actions"))[:, :3].reshape(3, -1)
    mean, std = run(rl, features, method="distribution")
    # float32 rounding of a sum with the base, whose values are large here
    assert np.abs(mean - base).max() <= 0.1 + 1e-5 * np.abs(base).max() and np.abs(mean - base).max() > 0.01
    assert (np.asarray(std) > 0).all()


def test_limits_map_the_data_to_minus_one_and_one_and_back_and_a_still_dimension_to_zero():
    policy = fresh_policy(policy_config(policy__action_dim=3))
    rows = RNG.uniform((0, -5, 7), (512, 5, 7), (40, 3)).astype(np.float32)
    policy.set_limits(rows)
    normalised = np.asarray(policy.normalise(rows))
    # one rounding of values up to 512
    np.testing.assert_allclose(normalised[:, :2].min(0), -1, atol=1e-5)
    np.testing.assert_allclose(normalised[:, :2].max(0), 1, atol=1e-5)
    np.testing.assert_array_equal(normalised[:, 2], 0)
    np.testing.assert_allclose(policy.raw_actions(jnp.asarray(normalised)), rows, rtol=1e-5, atol=1e-3)
    assert abs(float(policy.normalise(np.float32([600, 0, 7]))[0])) > 1  # nothing is clipped


def test_dropout_needs_a_key_keeps_the_mean_and_differs_by_key():
    policy = random_policy(policy_config(policy__dropout=0.5))
    features = np.ones((2000, 8), np.float32)
    still = [run(policy, features, method="base_actions") for _ in range(2)]
    np.testing.assert_array_equal(*still)
    drawn = [np.asarray(run(policy, features, jax.random.key(i), method="base_actions")) for i in (0, 1)]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01 and drawn[0].std(axis=0).max() > 0.01
    # of one linear-ReLU layer the mean is exact; two layers are close
    np.testing.assert_allclose(drawn[0].mean(axis=0), still[0][0], atol=0.1)


def test_a_state_is_read_where_the_policy_has_one():
    policy = random_policy(policy_config(policy__state_dim=4))
    states = RNG.normal(size=(3, 4)).astype(np.float32)
    one, other = (run(policy, IMAGES, s, method="features") for s in (states, states + 1))
    assert one.shape == (3, 8 + 5) and np.abs(one - other).max() > 1e-3
    with pytest.raises(ValueError, match="expected a state of 4 numbers"):
        policy.features(jnp.asarray(IMAGES))


def test_a_sample_without_robot_data_reads_the_learned_token_instead_of_a_state():
    policy = random_policy(policy_config(policy__rla__enabled=True, policy__state_dim=4))
    states, some = RNG.normal(size=(3, 4)).astype(np.float32), np.array([True, False, True])
    mixed = np.asarray(run(policy, IMAGES, states, some, method="features"))
    np.testing.assert_allclose(mixed[1], run(policy, IMAGES, method="features")[1], atol=1e-5)
    np.testing.assert_allclose(mixed[::2], run(policy, IMAGES, states, method="features")[::2], atol=1e-5)
    assert np.abs(mixed[0] - run(policy, IMAGES, method="features")[0]).max() > 1e-3


def test_the_latent_head_shares_the_trunk_and_actions_do_not_depend_on_it():
    policy = random_policy(policy_config(policy__rla__enabled=True))
    features = run(policy, IMAGES, method="features")
    actions, latent = run(policy, features, method="actions_and_latent")
    assert actions.shape == (3, 4, 2) and latent.shape == (3, 8)
    np.testing.assert_array_equal(actions, run(policy, features, method="base_actions"))


def test_what_a_policy_does_not_have_is_refused_in_one_line(grown):
    features = jnp.zeros((1, 8))
    plain = random_policy(policy_config())
    for method in ("distribution", "value", "actions_and_latent"):
        with pytest.raises(ValueError, match=r"^policy: expected [^\n]+$"):
            getattr(plain, method)(features)
    with pytest.raises(ValueError, match="found one that has them"):
        with_residual(grown[1], grown[2], nnx.Rngs(0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy__executed": 5}, r"config\.policy\.executed: expected between 1 and horizon=4 rows, found 5"),
        ({"policy__image_size": 0}, r"config\.policy\.image_size: expected at least 1, found 0"),
        ({"policy__resize": "bicubic"}, r"config\.policy\.resize: expected one of release, antialias, found 'bicubic'"),
        ({"policy__hidden": ()}, r"config\.policy\.hidden: expected positive widths, at least one, found \(\)"),
        ({"policy__dropout": 1.0}, r"config\.policy\.dropout: expected a probability below 1"),
        ({"policy__rla__enabled": True, "policy__rla__queries": 0}, r"config\.policy\.rla\.queries: expected at least"),
        ({"policy__residual__enabled": True, "policy__residual__lora_rank": -1}, r"lora_rank >= 0"),
        ({"dtype": "float16"}, r"config\.dtype"),
    ],
)
def test_sizes_that_make_no_policy_are_refused_by_the_name_of_their_field(overrides, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Policy(policy_config(**overrides), rngs=nnx.Rngs(0)))
