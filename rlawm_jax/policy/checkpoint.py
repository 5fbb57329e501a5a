"""Policies in run folders: written by cloning, reinforcement learning and conversion, read by everything that acts.

A policy's checkpoint holds, under `frozen`, exactly what is needed to act: averaged weights and normaliser limits.
Training state is stored beside it and is not needed for acting.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.models.policy import Policy
from rlawm_jax.run_folder.checkpoint import FROZEN, Checkpointer
from rlawm_jax.run_folder.config import config_from_meta
from rlawm_jax.run_folder.provenance import provenance
from rlawm_jax.sharding import make_mesh, replicated


def save_policy(workdir: str | Path, config: ConfigDict, policy: Policy, step: int, *, state: Any = None) -> None:
    """Write a checkpoint that `load_policy` reads; `state` is what training needs to resume.

    `config` is the policy's config (from `load_policy`, `with_residual`), which describes the policy's observations.
    """
    checkpoints = Checkpointer(workdir)
    state = {"step": jnp.int32(step)} if state is None else state
    checkpoints.save(step, state, nnx.state(policy), {}, policy_meta(config))
    checkpoints.close()


def policy_meta(config: ConfigDict) -> dict[str, Any]:
    """The metadata of a policy's checkpoint."""
    return provenance(config) | {"fingerprint": config.observed.backbone}


def load_policy(workdir: str | Path, *, step: int | None = None) -> tuple[Policy, ConfigDict]:
    """(policy, config) of a run's newest checkpoint, or of `step`, on the first device of this process."""
    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        step = checkpoints.latest_intact() if step is None else step
        if step not in checkpoints.steps:
            raise FileNotFoundError(f"{workdir}: expected a checkpoint of step {step}, found {checkpoints.steps}")
        config = config_from_meta(checkpoints.meta(step))
        if "policy" not in config:
            raise ValueError(
                f"{workdir}: expected the run folder of a policy, found a world model's; "
                f"train a policy with launch.train_policy --config.world_model={workdir}"
            )
        graphdef, skeleton = nnx.split(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))
        place = replicated(make_mesh(1, 1, 1, jax.local_devices()[:1]))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), skeleton)
        return nnx.merge(graphdef, checkpoints.arrays(step, **{FROZEN: abstract})[FROZEN]), config
    finally:
        checkpoints.close()
