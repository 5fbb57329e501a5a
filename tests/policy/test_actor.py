"""Policies in use: what is saved comes back, and a policy looks through no eyes but those it was trained with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.policy import with_residual
from rlawm_jax.policy.actor import Actor
from rlawm_jax.policy.checkpoint import load_policy, save_policy
from rlawm_jax.policy.observation import decoded, load_observation_model
from rlawm_jax.run_folder.checkpoint import CheckpointError
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.backbone import fingerprint
from tests.tiny_policy import policy_config, random_policy, randomise, shared_world, write_world_model
from tests.tiny_run import SIZE

FRAMES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def world(tiny_root):
    return shared_world(tiny_root)


@pytest.fixture(scope="module")
def model(world):
    return load_world_model(world, with_backbone=True)[0]


@pytest.fixture(scope="module")
def config(world, model):
    config = policy_config(observation="decoded", world_model=str(world))
    config.observed.update({"image_size": SIZE, "backbone": "any", "image_decoder": fingerprint(model.image_decoder)})
    return config


@pytest.mark.slow
def test_an_rl_policy_comes_back_and_acts_through_the_world_models_eyes(config, model, tmp_path):
    policy, config = with_residual(random_policy(config), config, nnx.Rngs(0))
    policy = randomise(policy, seed=2)
    policy.set_limits(np.array([[0, 10], [100, 30]], np.float32))
    save_policy(tmp_path, config, policy, 7)
    loaded, loaded_config = load_policy(tmp_path)
    assert loaded_config.policy.residual.enabled and loaded_config.world_model == config.world_model
    for left, right in zip(*(jax.tree.leaves(nnx.state(p)) for p in (loaded, policy)), strict=True):
        np.testing.assert_array_equal(left, right)
    actor = Actor.load(tmp_path)
    assert (actor.image_size, actor.action_dim, actor.executed) == (SIZE, 2, 3)
    features = policy.features(decoded(model, model.encode(jnp.asarray(FRAMES)), 16, "release"))
    mean, _ = policy.distribution(features)
    actions = actor.act(FRAMES)
    # one compiled program against the same operations one by one
    np.testing.assert_allclose(actions, policy.raw_actions(mean.reshape(3, 3, 2)), rtol=1e-3, atol=1e-2)
    assert actions.dtype == np.float32 and actions.shape == (3, 3, 2)
    np.testing.assert_allclose(actor.act(FRAMES[1:2]), actions[1:2], rtol=1e-3, atol=1e-2)


def test_a_policy_that_looks_at_frames_as_they_are_needs_no_world_model(tmp_path):
    config = policy_config()
    config.observed.image_size = SIZE
    policy = random_policy(config)
    save_policy(tmp_path, config, policy, 1)
    assert load_observation_model(config) is None
    expected = policy.raw_actions(policy.base_actions(policy.features(jnp.asarray(FRAMES) / 255.0))[:, :3])
    np.testing.assert_allclose(Actor.load(tmp_path).act(FRAMES), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_pictures_of_another_decoder_are_refused(config, world, tiny_root, tmp_path):
    save_policy(tmp_path / "policy", config, random_policy(config), 1)
    other = write_world_model(tiny_root, tmp_path / "other", seed=1)
    with config.unlocked():
        saved, config.world_model = config.world_model, str(other)
    try:
        with pytest.raises(
            ValueError, match=r"config\.world_model: expected the image decoder [0-9a-f]{16} that"
        ) as error:
            load_observation_model(config)
    finally:
        with config.unlocked():
            config.world_model = saved
    assert "\n" not in str(error.value)


def test_folders_and_frames_that_are_none_are_one_line(config, world, tmp_path):
    with pytest.raises(CheckpointError, match="expected a run folder with checkpoints/, found none"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="expected the run folder of a policy, found a world model's"):
        load_policy(world)
    save_policy(tmp_path, config, random_policy(config), 5)
    with pytest.raises(ValueError, match=rf"expected the run folder of a world model, found a policy's.*\({world}\)"):
        load_world_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint of step 4, found \[5\]"):
        load_policy(tmp_path, step=4)
    actor = Actor(random_policy(config), config, None)
    for frames in (FRAMES[0], FRAMES[:, :14], FRAMES.astype(np.float32)):
        with pytest.raises(ValueError, match=r"frames: expected uint8 \[b, 28, 28, 3\] as in training, found") as error:
            actor.act(frames)
        assert "\n" not in str(error.value)
