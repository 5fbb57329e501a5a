"""The programs of a run as shapes only, to be compiled for machines that need not be present.

No data is read or computed: each builder returns a jitted function and its arguments as `jax.ShapeDtypeStruct`s with
shardings, exactly as training and evaluation would call it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.pipeline import batch_spec
from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, imagine
from rlawm_jax.models.layers import compute_dtype
from rlawm_jax.models.policy import Policy, trainable
from rlawm_jax.models.vit import DinoViT, variant
from rlawm_jax.rl.demonstrations import bank_spec
from rlawm_jax.rl.learner import Frozen, frozen_shardings, jit_run, state_shardings
from rlawm_jax.rl.learners import learner_settings, make_learner
from rlawm_jax.sharding import batch_sharding, check_batch_size, on_mesh, tree_shardings
from rlawm_jax.training.nonfinite import guarded
from rlawm_jax.training.setup import configured_step
from rlawm_jax.training.state import init_state, split_model
from rlawm_jax.training.step import jit_train_step, make_objectives, make_transforms
from rlawm_jax.world_model import WorldModel

BANK = (100, 100)  # demonstrations, and frames in each, for which the RL iteration is compiled


class Program(NamedTuple):
    """A jitted function with its abstract arguments, and the same arrays grouped by kind: kind -> tree."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    kinds: dict[str, Any]


def abstract_model(config: ConfigDict, *, with_backbone: bool) -> WorldModel:
    """The world model of a config as shapes, without its LPIPS network."""

    def build() -> WorldModel:
        rngs = nnx.Rngs(0)
        spec, dtype = variant(config.backbone.name), compute_dtype(config.dtype)
        backbone = DinoViT(spec, dtype=dtype, attention=config.attention, rngs=rngs) if with_backbone else None
        return WorldModel(config, backbone=backbone, rngs=rngs)

    return nnx.eval_shape(build)


def train_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The training step of `config`, as `launch.train` compiles it."""
    check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
    objectives = make_objectives(config)
    transforms = make_transforms(config, objectives)
    model = abstract_model(config, with_backbone=config.data.source == "frames")
    graphdef, params, frozen = split_model(model, list(objectives))
    state = jax.eval_shape(
        partial(init_state, transforms=transforms), params, latent_scale=model.latent_scale.get_value()
    )
    state, frozen = _sharded(state, mesh), _sharded(frozen, mesh)
    batch = _batch(config, mesh, with_frames="image_decoder" in objectives)
    step = guarded(configured_step(config, graphdef, objectives, transforms), config.train.on_nonfinite)
    kinds = {"parameters": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch}
    return Program(jit_train_step(step, state, frozen, mesh, list(batch)), (state, frozen, batch), kinds)


def sample_program(config: ConfigDict, mesh: Mesh) -> Program:
    """One predicted chunk per window of a batch, decoded to an image: `imagine`, as evaluation and RL run it."""
    check_batch_size(config.data.batch_size, mesh)
    graphdef, weights = nnx.split(abstract_model(config, with_backbone=False))
    sampler = Sampler(**config.sampler)
    whole = _batch(config, mesh, with_frames=False)
    batch = {name: whole[name] for name in ("actions", "num_actions", "robot_id")}
    rows = config.data.batch_size
    tokens, ids = _rows(mesh, (rows, *_token_shape(config)), jnp.float32), _rows(mesh, (rows,), jnp.int32)

    def sample(weights: nnx.State, tokens: Any, batch: dict[str, Any], ids: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, weights)
        chunk = Chunk(batch["actions"][None], batch["num_actions"][None])
        imagined = imagine(
            model, tokens, chunk, jax.random.key(0), robot_id=batch["robot_id"], ids=ids, sampler=sampler
        )
        return imagined.tokens[-1], model.decode(imagined.tokens[-1])

    weights = _sharded(weights, mesh)
    function = jax.jit(on_mesh(sample, mesh), out_shardings=batch_sharding(mesh))
    return Program(function, (weights, tokens, batch, ids), {"parameters": weights, "batch": (tokens, batch)})


def rl_program(config: ConfigDict, mesh: Mesh, *, rl: ConfigDict, policy: ConfigDict) -> Program:
    """One iteration of a learner in the world model of `config`, with the settings of `rl` and a clone of `policy`.

    `num_envs` is rounded up to a multiple of the devices, and PPO's minibatch is scaled in proportion. The
    demonstrations have the sizes of `BANK`.
    """
    recipe, cloned = rl.copy_and_resolve_references(), policy.copy_and_resolve_references()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    settings = learner_settings(recipe)
    envs = -(-settings.num_envs // parts) * parts
    if recipe.learner == "ppo":
        settings.minibatch = settings.minibatch * envs // settings.num_envs
    settings.num_envs = envs
    with cloned.unlocked():
        cloned.policy.action_dim = max(config.denoiser.action_dims.values())
        cloned.policy.executed = min(cloned.policy.executed, config.data.max_horizon - 1)
        cloned.policy.residual.update({**recipe.residual, "enabled": True})
    actor = nnx.eval_shape(lambda: Policy(cloned, rngs=nnx.Rngs(0)))
    actor_def, params, rest = nnx.split(actor, trainable, ...)
    model_def, weights = nnx.split(abstract_model(config, with_backbone=recipe.bank.store == "frames"))
    sees = {"observation_size": cloned.policy.image_size, "observation_resize": cloned.policy.resize}
    learner = make_learner(recipe, actor_def, model_def, chunk=cloned.policy.executed, **sees)
    shape = _frame_shape(config) if recipe.bank.store == "frames" else _token_shape(config)
    episodes, length = BANK
    bank = bank_spec(shape, recipe.bank.store, mesh, frames=episodes * length, episodes=episodes)
    frozen = Frozen(rest, weights, bank)
    frozen = _with(frozen, frozen_shardings(frozen, mesh))
    state = jax.eval_shape(learner.init, params, frozen)
    state = _with(state, state_shardings(state, mesh))
    kinds = {
        "policy": (state.params, frozen.policy),
        "optimizer": state.opt_state,
        "world model": frozen.model,
        "demonstrations": frozen.bank,
        "environments": (state.env, state.observation),
    }
    return Program(jit_run(learner, state, frozen, mesh, 1), (state, frozen), kinds)


PROGRAMS: dict[str, Callable[..., Program]] = {"train": train_program, "rl": rl_program, "sample": sample_program}


def _batch(config: ConfigDict, mesh: Mesh, *, with_frames: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch as the pipeline yields it for `config` and as `shard_batch` places it."""
    tokens = config.data.source == "tokens"
    spec = batch_spec(
        config.data,
        config.data.batch_size,
        action_dim=max(config.denoiser.action_dims.values()),
        frame_shape=_frame_shape(config) if with_frames or not tokens else None,
        token_shape=_token_shape(config) if tokens else None,
    )
    return {name: _rows(mesh, shape, jax.dtypes.canonicalize_dtype(dtype)) for name, (shape, dtype) in spec.items()}


def _frame_shape(config: ConfigDict) -> tuple[int, ...]:
    return (config.backbone.image_size, config.backbone.image_size, 3)


def _token_shape(config: ConfigDict) -> tuple[int, ...]:
    return variant(config.backbone.name).token_shape((config.backbone.image_size, config.backbone.image_size))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _sharded(tree: Any, mesh: Mesh) -> Any:
    return _with(tree, tree_shardings(tree, mesh))


def _with(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)
