"""A tiny world model and a random policy that looks through it, as run folders."""

import numpy as np
import pytest

from rlawm_jax.policy.checkpoint import save_policy
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.backbone import fingerprint
from rlawm_jax.world_model import PARTS
from tests.tiny_policy import policy_config, random_policy, write_world_model
from tests.tiny_run import SIZE


@pytest.fixture(scope="session")
def world(tiny_root, tmp_path_factory):
    return write_world_model(tiny_root, tmp_path_factory.mktemp("world"), moved=PARTS)


@pytest.fixture(scope="session")
def cloned(world, tmp_path_factory):
    """A run folder of a random policy that looks through the world model."""
    model = load_world_model(world)[0]
    config = policy_config(observation="decoded", world_model=str(world))
    config.observed.update({"image_size": SIZE, "backbone": "any", "image_decoder": fingerprint(model.image_decoder)})
    policy = random_policy(config)
    policy.set_limits(np.array([[0, 0], [SIZE, SIZE]], np.float32))
    workdir = tmp_path_factory.mktemp("cloned")
    save_policy(workdir, config, policy, 1)
    return workdir
