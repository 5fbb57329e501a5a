"""The smallest policies there are, and a world model's run folder for them to look through."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import policy
from rlawm_jax.models.policy import Policy
from rlawm_jax.run_folder.checkpoint import Checkpointer
from rlawm_jax.training.setup import prepare
from tests import tiny_run
from tests.tiny_models import initialised, random_module

LATENT_DIM = 2 * 4  # of tiny_run's world model


def policy_config(**overrides) -> ConfigDict:
    """configs/policy.py with two stages of 4 and 8 channels at 16 px; overrides by name, "policy__rla__enabled"."""
    config = policy.get_config()
    config.observation = "raw"
    config.policy.update({"image_size": 16, "widths": (4, 8), "blocks": (1, 1), "action_dim": 2, "hidden": (16, 12)})
    config.policy.update({"horizon": 4, "executed": 3, "state_hidden": (6, 5)})
    rla = {"width": 8, "depth": 1, "heads": 2, "queries": 3, "hidden": (16, 12), "latent_dim": LATENT_DIM}
    config.policy.rla.update(rla)
    config.policy.residual.update({"hidden": (12, 6), "critic_hidden": (10, 5), "lora_rank": 2})
    config.data.update({"demonstrations": ("pusht:demo",), "video": ("pusht:demo",), "val_episodes": 2})
    config.data.update({"batch_size": 8, "pad_after": 2})
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 0})
    config.train.update({"steps": 4, "checkpoint_every": 2, "log_every": 1})
    config.logging.tensorboard = False
    config.lock()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def random_policy(config: ConfigDict, seed: int = 0) -> Policy:
    """A policy whose every parameter is random: nothing hides behind a zero."""
    return random_module(lambda rngs: Policy(config, rngs=rngs), seed)


def fresh_policy(config: ConfigDict) -> Policy:
    """A policy as its own initialisers leave it."""
    return initialised(lambda rngs: Policy(config, rngs=rngs))


def randomise(policy: Policy, seed: int) -> Policy:
    """The same architecture with other parameters, statistics kept."""
    graphdef, params, rest = nnx.split(policy, nnx.Param, ...)
    other = nnx.state(random_module(lambda _: nnx.merge(graphdef, params, rest), seed), nnx.Param)
    return nnx.merge(graphdef, other, rest)


def write_world_model(root: Path, workdir: Path, *, moved: tuple[str, ...] = ("image_decoder",), **overrides) -> Path:
    """A run folder of tiny_run's world model in `workdir`, saved as if step 1 were done.

    Parts `moved` away from their initial zeros do something: frames are not black, actions change what is imagined.
    """
    run = prepare(tiny_run.tiny_config(root, **overrides), workdir)
    params, rng = dict(run.state.params), np.random.default_rng(0)
    for part in (part for part in moved if part in params):
        params[part] = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params[part])
    checkpoints = Checkpointer(workdir)
    checkpoints.save(1, run.state._replace(params=params), run.saved_frozen(), {}, run.meta)
    checkpoints.close()
    return workdir


@functools.cache
def shared_world(root: Path) -> Path:
    """A run folder beside the tiny dataset, written once per test process; to be read only."""
    return write_world_model(root, root / "world_model")
