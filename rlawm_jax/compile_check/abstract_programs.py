"""The programs of a run as shapes only, to be compiled for machines that are not there.

Nothing is read and nothing is computed: each builder returns a jitted function and its arguments as
`jax.ShapeDtypeStruct`s with shardings, exactly as training and evaluation would call it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from configs import policy as policy_recipe
from configs import rl as rl_recipe
from rlawm_jax.flow import Sampler
from rlawm_jax.imagination import Chunk, imagine
from rlawm_jax.models.layers import compute_dtype
from rlawm_jax.models.policy import Policy, trainable
from rlawm_jax.models.vit import DinoViT, variant
from rlawm_jax.rl.demonstrations import Bank
from rlawm_jax.rl.learner import Frozen, frozen_shardings, jit_run, state_shardings
from rlawm_jax.rl.setup import make_learner
from rlawm_jax.sharding import batch_sharding, check_batch_size, on_mesh, replicated, tree_shardings
from rlawm_jax.training.nonfinite import guarded
from rlawm_jax.training.setup import configured_step
from rlawm_jax.training.state import init_state, split_model
from rlawm_jax.training.step import jit_train_step, make_objectives, make_transforms
from rlawm_jax.world_model import WorldModel

BANK = (100, 100)  # demonstrations, and frames of each, that the RL iteration is compiled with


class Program(NamedTuple):
    """A jitted function with its abstract arguments, and which arrays of them are what: kind -> tree."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    kinds: dict[str, Any]


def abstract_model(config: ConfigDict, *, with_backbone: bool) -> WorldModel:
    """The world model of a config as shapes, without its LPIPS network."""

    def build() -> WorldModel:
        rngs = nnx.Rngs(0)
        spec = variant(config.backbone.name)
        backbone = DinoViT(spec, dtype=compute_dtype(config.dtype), rngs=rngs) if with_backbone else None
        return WorldModel(config, backbone=backbone, rngs=rngs)

    return nnx.eval_shape(build)


def train_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The training step of `config`, as `launch.train` compiles it."""
    check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
    objectives = make_objectives(config)
    transforms = make_transforms(config, objectives)
    model = abstract_model(config, with_backbone=config.data.source == "frames")
    graphdef, params, frozen = split_model(model, list(objectives))
    state = jax.eval_shape(partial(init_state, transforms=transforms), params, latent_scale=_shape((), jnp.float32))
    state, frozen = _sharded(state, mesh), _sharded(frozen, mesh)
    batch = batch_shapes(config, mesh, with_frames="image_decoder" in objectives)
    step = guarded(configured_step(config, graphdef, objectives, transforms), config.train.on_nonfinite)
    kinds = {"parameters": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch}
    return Program(jit_train_step(step, state, frozen, mesh, list(batch)), (state, frozen, batch), kinds)


def sample_program(config: ConfigDict, mesh: Mesh) -> Program:
    """One predicted chunk for every window of a batch, and its picture: `imagine`, as evaluation and RL run it."""
    check_batch_size(config.data.batch_size, mesh)
    graphdef, weights = nnx.split(abstract_model(config, with_backbone=False))
    sampler = Sampler(**config.sampler)
    whole = batch_shapes(config, mesh, with_frames=False)
    batch = {name: whole[name] for name in ("actions", "num_actions", "robot_id")}
    rows = config.data.batch_size
    tokens, ids = _rows(mesh, (rows, *token_shape(config)), jnp.float32), _rows(mesh, (rows,), jnp.int32)

    def sample(weights: nnx.State, tokens: Any, batch: dict[str, Any], ids: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, weights)
        chunk = Chunk(batch["actions"][None], batch["num_actions"][None])
        found = imagine(model, tokens, chunk, jax.random.key(0), robot_id=batch["robot_id"], ids=ids, sampler=sampler)
        return found.tokens[-1], model.decode(found.tokens[-1])

    weights = _sharded(weights, mesh)
    function = jax.jit(on_mesh(sample, mesh), out_shardings=batch_sharding(mesh))
    return Program(function, (weights, tokens, batch, ids), {"parameters": weights, "batch": (tokens, batch)})


def rl_program(
    config: ConfigDict, mesh: Mesh, rl: ConfigDict | None = None, policy: ConfigDict | None = None
) -> Program:
    """One PPO iteration in the world model of `config`, by the settings of `rl` with a cloned policy of `policy`.

    They default to the official ones, with as many environments as `num_envs` and the next multiple of the devices,
    and minibatches in proportion. The demonstrations are `BANK`.
    """
    recipe = (rl or rl_recipe.get_config()).copy_and_resolve_references()
    cloned = (policy or policy_recipe.get_config()).copy_and_resolve_references()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    envs = -(-recipe.ppo.num_envs // parts) * parts
    recipe.ppo.minibatch = recipe.ppo.minibatch * envs // recipe.ppo.num_envs
    recipe.ppo.num_envs = envs
    with cloned.unlocked():
        cloned.policy.action_dim = max(config.denoiser.action_dims.values())
        cloned.policy.executed = min(cloned.policy.executed, config.data.max_horizon)
        cloned.policy.residual.update({**recipe.residual, "enabled": True})
    actor = nnx.eval_shape(lambda: Policy(cloned, rngs=nnx.Rngs(0)))
    actor_def, params, rest = nnx.split(actor, trainable, ...)
    model_def, weights = nnx.split(abstract_model(config, with_backbone=recipe.bank.store == "frames"))
    sizes = {"chunk": cloned.policy.executed, "observation_size": cloned.policy.image_size}
    learner = make_learner(recipe, actor_def, model_def, **sizes)
    frozen = Frozen(rest, weights, bank_shapes(config, mesh, recipe.bank.store))
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


def bank_shapes(config: ConfigDict, mesh: Mesh, store: str) -> Bank:
    """Demonstrations on the devices: `BANK` episodes x frames, stored as the recipe says."""
    episodes, length = BANK
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    frames = -(-episodes * length // parts) * parts
    shape: tuple[int, ...] = token_shape(config)
    if store == "frames":
        shape = (config.backbone.image_size, config.backbone.image_size, 3)
    dtype = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "frames": jnp.uint8}[store]
    scale: Any = _rows(mesh, (frames, shape[0], 1), jnp.float32) if store == "int8" else None
    index: Any = [_shape((episodes,), jnp.int32, replicated(mesh))] * 3
    data: Any = _rows(mesh, (frames, *shape), dtype)
    return Bank(data, scale, *index)


def batch_shapes(config: ConfigDict, mesh: Mesh, *, with_frames: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch as the pipeline yields it for `config`, without masks."""
    data, rows = config.data, config.data.batch_size
    size = config.backbone.image_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "actions": ((rows, data.max_horizon, max(config.denoiser.action_dims.values())), jnp.float32),
        "num_actions": ((rows,), jnp.int32),
        "robot_id": ((rows,), jnp.int32),
    }
    if data.source == "tokens":
        shapes["tokens"] = ((rows, 2, *token_shape(config)), jnp.bfloat16)
    if data.source == "frames" or with_frames:
        shapes["frames"] = ((rows, 2, size, size, 3), jnp.uint8)
    return {name: _rows(mesh, shape, dtype) for name, (shape, dtype) in shapes.items()}


def token_shape(config: ConfigDict) -> tuple[int, int]:
    """(number, width) of the backbone's tokens of a picture."""
    spec = variant(config.backbone.name)
    return (-(-config.backbone.image_size // spec.patch)) ** 2, spec.width


def _shape(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return _shape(shape, dtype, batch_sharding(mesh))


def _sharded(tree: Any, mesh: Mesh) -> Any:
    return _with(tree, tree_shardings(tree, mesh))


def _with(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: _shape(x.shape, x.dtype, sharding), tree, shardings)
