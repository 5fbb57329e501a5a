"""A prepared run of reinforcement learning in the toy world: everything that its run folder needs, in a second."""

import jax
from ml_collections import ConfigDict

from configs import rl
from rlawm_jax.rl.learner import frozen_shardings, state_shardings
from rlawm_jax.rl.setup import RLRun
from rlawm_jax.sharding import make_mesh, put
from tests.rl.test_ppo_learner import make
from tests.rl.toy import demonstrations
from tests.tiny_policy import policy_config


def toy_config(**train) -> ConfigDict:
    """Four calls of two iterations, a checkpoint after every call; `train` goes to config.train."""
    config = rl.get_config()
    config.policy = "a clone"
    config.train.update({"iterations": 8, "iterations_per_call": 2, "checkpoint_every": 2, **train})
    config.logging.tensorboard = False
    return config


def toy_run(config: ConfigDict, **identity) -> RLRun:
    """As `rl.setup.prepare` makes it, of the toy world and its policy; `identity` is what a resumed run must find."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    learner, state, frozen = make(seed=config.seed, mesh=mesh)
    state, frozen = put(state, state_shardings(state, mesh)), put(frozen, frozen_shardings(frozen, mesh))
    recorded = demonstrations()
    return RLRun(config, policy_config(), mesh, learner, state, frozen, frozen.bank, (recorded, recorded), identity)
