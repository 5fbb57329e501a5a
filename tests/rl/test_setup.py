"""From run folders to a learner, and the loop around it: real policy, real world model, both tiny."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base, rl
from rlawm_jax.evaluation.closed_loop import load_imagined
from rlawm_jax.policy.actor import Actor
from rlawm_jax.policy.checkpoint import load_policy, save_policy
from rlawm_jax.rl import setup
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.identity import identity_of
from rlawm_jax.rl.learners import make_learner
from rlawm_jax.rl.loop import train
from rlawm_jax.rl.setup import prepare
from rlawm_jax.world_model import PARTS
from tests.rl.tiny import make
from tests.tiny_policy import policy_config, random_policy, write_world_model
from tests.tiny_run import EPISODES, LENGTH, SIZE, read_metrics


def test_a_recipe_explores_with_white_noise_and_rewards_one_draw_unless_it_says_otherwise():
    config = rl.get_config()
    official = make_learner(config, None, None, chunk=8, observation_size=128)
    assert official.ppo.exploration == Exploration(8, 0.0) and official.env.spec.reward_draws == 1
    config.ppo.exploration_correlation, config.env.reward_draws = 0.9, 4
    ours = make_learner(config, None, None, chunk=8, observation_size=128)
    assert ours.ppo.exploration == Exploration(8, 0.9) and ours.env.spec.reward_draws == 4


@pytest.mark.slow
def test_heads_and_low_rank_branches_start_as_an_exact_no_op(tiny_root, cloned):
    base, _ = load_policy(cloned)
    grown = prepare(make(tiny_root, cloned)).policy()
    images = jax.random.uniform(jax.random.key(0), (3, SIZE, SIZE, 3))
    np.testing.assert_array_equal(grown.features(images), base.features(images))
    mean, std = grown.distribution(grown.features(images))
    np.testing.assert_array_equal(mean, base.base_actions(base.features(images))[:, : base.executed].reshape(3, -1))
    np.testing.assert_allclose(std, 0.1 * np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_demonstrations_are_split_as_in_training(tiny_root, cloned):
    run = prepare(make(tiny_root, cloned))
    assert len(run.frozen.bank.length) == len(EPISODES) - 2 and len(run.held_out.length) == 2
    assert (np.asarray(run.frozen.bank.length) == LENGTH).all()
    assert len(prepare(make(tiny_root, cloned, bank__episodes=1)).frozen.bank.length) == 1


@pytest.mark.slow
def test_tokens_and_pictures_in_the_bank_start_the_same_episodes(tiny_root, cloned):
    tokens = prepare(make(tiny_root, cloned)).state.env.tokens
    pictures = prepare(make(tiny_root, cloned, bank__store="frames")).state.env.tokens
    # the cache and the bank hold bfloat16: 8 bits
    np.testing.assert_allclose(tokens, pictures, rtol=2**-7, atol=2**-7)


LEARNERS = pytest.mark.parametrize("learner", ["ppo", "pathwise"])


@pytest.mark.slow
@LEARNERS
def test_learning_moves_the_heads_and_never_the_base(tiny_root, cloned, tmp_path, learner):
    run = prepare(make(tiny_root, cloned, learner=learner))
    before = nnx.to_flat_state(nnx.state(run.policy()))
    train(run, tmp_path)
    after = dict(nnx.to_flat_state(nnx.state(load_policy(tmp_path)[0])))
    changed = {path for path, leaf in before if not np.array_equal(leaf.get_value(), after[path].get_value())}
    assert changed
    assert all(path[0] in ("residual", "critic") or "lora" in path for path in changed)
    assert {path[0] for path in changed} >= {"residual", "critic", "encoder"}  # the encoder's branches
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(line["rl/reward"]) for line in metrics)
    imagined = load_imagined(tmp_path)
    assert imagined is not None and len(imagined.after) == 2
    assert Actor.load(tmp_path).act(np.zeros((1, SIZE, SIZE, 3), np.uint8)).shape == (1, 3, 2)


@pytest.mark.slow
@LEARNERS
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(tiny_root, cloned, tmp_path, learner):
    train(prepare(make(tiny_root, cloned, learner=learner)), tmp_path / "unbroken")
    train(prepare(make(tiny_root, cloned, learner=learner, train__iterations=2)), tmp_path / "broken")
    train(prepare(make(tiny_root, cloned, learner=learner)), tmp_path / "broken")
    left, right = (nnx.state(load_policy(tmp_path / name)[0]) for name in ("unbroken", "broken"))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert read_metrics(tmp_path / "unbroken") == read_metrics(tmp_path / "broken")
    assert load_imagined(tmp_path / "unbroken") == load_imagined(tmp_path / "broken")


@pytest.mark.slow
def test_returns_of_the_untrained_policy_are_those_of_the_base(tiny_root, cloned):
    run = prepare(make(tiny_root, cloned))
    where = jnp.zeros(2, jnp.int32), jnp.array([0, 3], jnp.int32)
    found = jax.jit(run.learner.returns)(run.state.params, run.frozen, *where, jax.random.key(0))
    assert (found["return"] < 0).all() and found["steps"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy": ""}, r"config\.policy: expected the run folder of a cloned policy"),
        ({"learner": "sac"}, r"config\.learner: expected one of ppo, pathwise, found 'sac'"),
        ({"learner": "pathwise", "pathwise__group_size": 3}, r"config\.pathwise\.group_size: expected a divisor"),
        ({"ppo__minibatch": 3}, r"config\.ppo\.minibatch: expected a divisor of num_envs x num_steps = 4 x 2 = 8"),
        # before any demonstration is looked for
        (
            {"ppo__group_size": 3, "data__root": "/nowhere"},
            r"config\.ppo\.group_size: expected a divisor of num_envs = 4",
        ),
        ({"bank__episodes": 99}, r"config\.bank\.episodes: expected at most 4, the training demonstrations"),
        ({"bank__limit_gib": 1e-9}, r"demonstration bank: 4 episodes, 48 frames x .* at most config\.bank\.limit_gib"),
        ({"bank__datasets": ()}, r"config\.bank\.datasets: expected at least one 'name:split'"),
        ({"data__val_episodes": 0}, r"config\.bank\.datasets: expected held-out demonstrations"),
        ({"world_model": "/nowhere"}, r"/nowhere: expected a run folder"),
        ({"env__metric": "l3"}, r"config\.env\.metric: expected one of l1, l2, cosine"),
        (
            {"env__action_low": (0.0,), "env__action_high": (9.0,)},
            r"config\.env\.action_low, action_high: expected 2 bounds, one per action of .*, found 1",
        ),
    ],
)
def test_what_a_person_gets_wrong_is_named(tiny_root, cloned, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
        prepare(make(tiny_root, cloned, **overrides))


def test_a_clone_of_recorded_frames_is_refused_since_imagination_shows_decoded_ones(tiny_root, world_run, tmp_path):
    config = policy_config(observation="raw")
    config.observed.image_size = SIZE
    save_policy(tmp_path, config, random_policy(config), 1)
    with pytest.raises(
        ValueError, match=r"config\.policy: expected .* decoded frames, .*, found observation=raw"
    ) as error:
        prepare(make(tiny_root, tmp_path, world_model=str(world_run)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stride": 2}, r"config\.world_model: expected data\.stride=1, .* found 2 in .*--config\.data\.stride=1"),
        ({"last_action": True}, r"config\.world_model: expected data\.last_action=False, .* found True in"),
        # the policy executes 3 rows, and a window of 3 frames has 2
        ({"max_horizon": 3}, r"config\.policy: expected chunks of 1 to 2 actions, .* found 3 executed by"),
        ({"min_horizon": 5}, r"config\.policy: expected chunks of 4 to 8 actions, .* found 3 executed by"),
    ],
)
def test_a_world_model_that_never_saw_such_chunks_is_refused(tiny_root, cloned, monkeypatch, changed, message):
    load = setup.load_world_model

    def load_another(*args, **options):
        model, config, meta = load(*args, **options)
        with config.unlocked():
            config.data.update(changed)
        return model, config, meta

    monkeypatch.setattr(setup, "load_world_model", load_another)
    with pytest.raises(ValueError, match=message) as error:
        prepare(make(tiny_root, cloned))
    assert "\n" not in str(error.value)


def test_a_window_of_one_frame_more_than_the_chunk_has_rows_is_enough(tiny_root, cloned):
    config = make(tiny_root, cloned)
    data = base.get_config().data
    data.max_horizon = 4
    setup.check_windows(config, data, chunk=3)
    with pytest.raises(ValueError, match="expected chunks of 1 to 3 actions"):
        setup.check_windows(config, data, chunk=4)


def test_every_thing_a_run_starts_from_is_in_its_identity(tiny_root, cloned):
    config, meta = make(tiny_root, cloned), {"step": 1, "checksum": "abc"}
    clone = nnx.state(random_policy(policy_config()))
    datasets = SimpleNamespace(stores={"pusht:demo": SimpleNamespace(digest="d1")})
    found = identity_of(config, clone, meta, datasets)
    other = SimpleNamespace(stores={"pusht:demo": SimpleNamespace(digest="d2")})
    changed = [
        identity_of(make(tiny_root, cloned, seed=1), clone, meta, datasets),
        identity_of(make(tiny_root, cloned, learner="pathwise"), clone, meta, datasets),
        identity_of(config, nnx.state(random_policy(policy_config(), seed=1)), meta, datasets),
        identity_of(config, clone, meta | {"checksum": "abd"}, datasets),
        identity_of(config, clone, meta, other),
        identity_of(make(tiny_root, cloned, bank__episodes=1), clone, meta, datasets),
        identity_of(make(tiny_root, cloned, bank__store="int8"), clone, meta, datasets),
        identity_of(make(tiny_root, cloned, data__val_episodes=1), clone, meta, datasets),
    ]
    differing = [[key for key in found if found[key] != others[key]] for others in changed]
    assert all(len(keys) == 1 for keys in differing) and len({keys[0] for keys in differing}) == len(changed)
    more_memory = identity_of(make(tiny_root, cloned, bank__limit_gib=9.0), clone, meta, datasets)
    assert more_memory == found


@pytest.mark.slow
def test_a_run_in_imagination_is_resumed_in_the_world_it_began_in_alone(tiny_root, cloned, tmp_path):
    train(prepare(make(tiny_root, cloned, train__iterations=2)), tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.seed: expected 0, which the run in this folder started from, found 1"
    ):
        train(prepare(make(tiny_root, cloned, seed=1)), tmp_path)
    other = write_world_model(tiny_root, tmp_path / "world", moved=PARTS[:-1])  # with the same image decoder
    with pytest.raises(ValueError, match=r"config\.world_model \(its checkpoint\): expected [0-9a-f]{16} of step 1"):
        train(prepare(make(tiny_root, cloned, world_model=str(other))), tmp_path)


@pytest.mark.slow
def test_a_policy_that_has_been_through_learning_is_not_started_from(tiny_root, cloned, tmp_path):
    train(prepare(make(tiny_root, cloned, train__iterations=2)), tmp_path)
    with pytest.raises(ValueError, match=r"config\.policy: expected a cloned policy, found one that has been through"):
        prepare(make(tiny_root, tmp_path))
    with pytest.raises(ValueError, match=r"iterations_per_call: expected a divisor"):
        train(prepare(make(tiny_root, cloned, train__iterations=3)), tmp_path)
