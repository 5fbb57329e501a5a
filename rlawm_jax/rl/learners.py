"""The learner that a recipe describes: config.learner and the section of the same name."""

from dataclasses import fields
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.flow import Sampler
from rlawm_jax.rl.env import EnvSpec, ImaginationEnv
from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.learner import Learner, make_policy_optimizer
from rlawm_jax.rl.pathwise import PathwiseLearner, PathwiseSpec
from rlawm_jax.rl.ppo import PPOSpec
from rlawm_jax.rl.ppo_learner import PPOLearner

# by config.learner, whose settings are the section of the same name
TITLES = {"ppo": "PPO", "pathwise": "pathwise gradients"}


def make_learner(config: ConfigDict, policy: nnx.GraphDef, model: nnx.GraphDef, *, chunk: int, **sees: Any) -> Learner:
    """The learner described by a recipe (configs/rl.py), for a policy that executes `chunk` actions at a time.

    `sees` are the fields of `EnvSpec` that say what the policy sees.
    ValueError names the setting that is inconsistent with the others.
    """
    settings = learner_settings(config)
    common = {
        "policy": policy,
        "model": model,
        "env": ImaginationEnv(EnvSpec(chunk=chunk, sampler=Sampler(**config.sampler), **sees, **config.env)),
        "num_envs": settings.num_envs,
        "num_steps": settings.num_steps,
        "group_size": settings.group_size,
        "seed": config.seed,
    }
    exploration = Exploration(chunk, settings.exploration_correlation)

    def spec(kind: Any) -> Any:
        return kind(exploration=exploration, **{f.name: settings[f.name] for f in fields(kind) if f.name in settings})

    if config.learner == "ppo":
        tx, normalise = make_policy_optimizer(settings), settings.normalise_rewards
        return PPOLearner(ppo=spec(PPOSpec), tx=tx, normalise_rewards=normalise, **common)
    tx, critic_tx = (make_policy_optimizer(settings, part) for part in ("policy", "critic"))
    return PathwiseLearner(pathwise=spec(PathwiseSpec), tx=tx, critic_tx=critic_tx, **common)


def learner_settings(config: ConfigDict) -> ConfigDict:
    """The section of a recipe that describes its learner."""
    if config.learner not in TITLES:
        raise ValueError(f"config.learner: expected one of {', '.join(TITLES)}, found {config.learner!r}")
    return config[config.learner]
