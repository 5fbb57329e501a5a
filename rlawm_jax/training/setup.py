"""From a config and a run folder to everything the loop needs: data, model, optimizer, compiled step."""

import dataclasses
import os
import platform
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.episodes import EpisodeStore
from data.pipeline import TrainIterator, WindowBatches, WindowLoader, action_limits
from data.tokens import build_token_cache, token_cache_dir
from rlawm_jax.backbone import load_backbone
from rlawm_jax.checkpoint import FROZEN, STATE, Checkpointer, config_from_meta
from rlawm_jax.hosts import once
from rlawm_jax.image_metrics import load_lpips
from rlawm_jax.logging import say
from rlawm_jax.models.layers import Statistic
from rlawm_jax.models.vit import DinoViT
from rlawm_jax.objectives import Objective
from rlawm_jax.rng import stream
from rlawm_jax.sharding import batch_share, check_batch_size, make_mesh, place, tree_shardings
from rlawm_jax.training.state import TrainState, init_state, join_model, split_model
from rlawm_jax.training.step import TrainStep, make_objectives, make_train_step, make_transforms
from rlawm_jax.world_model import EXTERNAL, PARTS, Sampler, WorldModel, compute_dtype

ACTION_STATISTICS = ("none", "limits")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


@dataclasses.dataclass
class Run:
    """A prepared training run: `step_fn(state, frozen, batch)` is ready to be jitted over `mesh`."""

    config: ConfigDict
    mesh: Mesh
    iterator: TrainIterator
    state: TrainState
    frozen: nnx.State
    step_fn: TrainStep
    meta: dict[str, Any]

    def saved_frozen(self) -> nnx.State:
        """The untrained arrays a checkpoint holds."""
        return without_external(self.frozen)


def prepare(config: ConfigDict, workdir: Path) -> Run:
    """Open the data, load or initialise every part, and build the training step of `config`.

    Errors name the key or file at fault; nothing is written to `workdir`.
    """
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.data.batch_size, mesh, config.train.accumulate)
    Sampler(**config.sampler)  # training does not sample, but what it makes must be usable
    objectives = make_objectives(config)
    transforms = make_transforms(config, objectives)
    stores = open_stores(config)
    backbone, fingerprint = load_backbone(
        config.backbone.name, config.backbone.weights, dtype=compute_dtype(config.dtype)
    )
    if config.data.source == "tokens":
        ensure_token_caches(config, stores, backbone, fingerprint)
        backbone = None
    loader = WindowLoader(config.data, fingerprint=fingerprint, with_frames="image_decoder" in objectives)
    batches = WindowBatches(loader, "train", *batch_share(mesh))

    model = init_model(config, mesh, backbone)
    set_action_statistics(model, config, loader)
    set_lpips(model, config, "image_decoder" in objectives)
    trained_before = inherit_parts(model, config, fingerprint, mesh=mesh, skip=objectives)
    graphdef, params, frozen = split_model(model, list(objectives))
    frozen = place(frozen, mesh)  # statistics were measured on the host
    scale = place(model.latent_scale.get_value(), mesh)
    init = partial(init_state, transforms=transforms)
    shardings = tree_shardings(jax.eval_shape(init, params, latent_scale=scale), mesh)
    state = jax.jit(init, out_shardings=shardings)(params, latent_scale=scale)
    step_fn = configured_step(config, graphdef, objectives, transforms)
    meta = provenance(config) | {
        "fingerprint": fingerprint,
        "trained_parts": [part for part in PARTS if part in objectives or part in trained_before],
    }
    return Run(config, mesh, TrainIterator(batches, "train"), state, frozen, step_fn, meta)


def configured_step(
    config: ConfigDict,
    graphdef: nnx.GraphDef,
    objectives: dict[str, Objective],
    transforms: dict[str, optax.GradientTransformation],
) -> TrainStep:
    """The training step with the config's settings."""
    return make_train_step(
        graphdef,
        objectives,
        transforms,
        seed=config.seed,
        running_latent_scale=config.latent_scale.running,
        accumulate=config.train.accumulate,
    )


def init_model(config: ConfigDict, mesh: Mesh, backbone: DinoViT | None) -> WorldModel:
    """A world model with fresh parameters, each born in its own sharding: no unsharded copy ever exists."""

    def build() -> WorldModel:
        rngs = nnx.Rngs(stream(jax.random.key(config.seed), "parameters"))
        return WorldModel(config, backbone=None, rngs=rngs)

    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    state = jax.jit(lambda: nnx.state(build()), out_shardings=tree_shardings(abstract, mesh))()
    model = nnx.merge(graphdef, state)
    if backbone is not None:
        weights_def, weights = nnx.split(backbone)
        model.backbone = nnx.merge(weights_def, place(weights, mesh))
    return model


def without_external(state: nnx.State) -> nnx.State:
    """A model's state without the arrays that have weights files of their own."""
    return nnx.State({name: value for name, value in state.items() if name not in EXTERNAL})


def open_stores(config: ConfigDict) -> list[EpisodeStore]:
    """The datasets in use; refuses what the model would misread: pictures of another size, robots it does not know."""
    size = config.backbone.image_size
    references = {ref for group in config.data.groups.values() if group.weight > 0 for ref in group.datasets}
    stores = [EpisodeStore(config.data.root, reference) for reference in sorted(references)]
    for store in stores:
        if store.image_size != (size, size):
            raise ValueError(
                f"config.backbone.image_size: expected {store.image_size[0]} as in the pictures of {store.reference}, "
                f"found {size}; set it, or build the data with --image_size={size}"
            )
        robots = {str(robot) for robot in store.robot_ids if robot >= 0}
        if missing := sorted(robots - set(config.denoiser.action_dims)):
            raise ValueError(
                f"config.denoiser.action_dims: expected an entry for each robot of {store.reference}, found none for "
                f"robot {', '.join(missing)}; its actions would be ignored"
            )
    return stores


def set_action_statistics(model: WorldModel, config: ConfigDict, loader: WindowLoader) -> None:
    """Store in the action encoders how raw rows become what they read (config.data.action_statistics)."""
    kind = config.data.action_statistics
    if kind not in ACTION_STATISTICS:
        raise ValueError(f"config.data.action_statistics: expected one of {ACTION_STATISTICS}, found {kind!r}")
    width = loader.action_dim
    widest = max(config.denoiser.action_dims.values())
    if width < widest:
        raise ValueError(f"config.denoiser.action_dims: expected at most {width} (the data's), found {widest}")
    if kind == "none":
        return
    low, high = action_limits(loader)
    # a dimension that hardly moves maps to 0, as in the release's normaliser
    moving = high - low > 1e-4
    scale = np.where(moving, 2.0 / np.where(moving, high - low, 1.0), 1.0)
    offset = np.where(moving, -1.0 - scale * low, -low)
    for encoder in model.denoiser.action_encoders.values():
        encoder.scale.set_value(jnp.asarray(scale[: encoder.action_dim], jnp.float32))
        encoder.offset.set_value(jnp.asarray(offset[: encoder.action_dim], jnp.float32))


def set_lpips(model: WorldModel, config: ConfigDict, needed: bool) -> None:
    """Load the perceptual network where one is configured, and say so where a loss goes without it."""
    if config.lpips_weights:
        model.lpips = Statistic(load_lpips(config.lpips_weights))
    elif needed:
        say("the image decoder's LPIPS term is off: config.lpips_weights is empty")


def inherit_parts(
    model: WorldModel, config: ConfigDict, fingerprint: str, *, skip: Any, mesh: Mesh | None = None
) -> list[str]:
    """Take the parts that are not trained here from the run `config.train.init_from`; returns what that run trained."""
    if not config.train.init_from:
        return []
    other, other_config, meta = load_world_model(config.train.init_from, mesh=mesh)
    if meta["fingerprint"] != fingerprint:
        raise ValueError(
            f"config.train.init_from: expected a run on backbone {fingerprint}, found {meta['fingerprint']} "
            f"({other_config.backbone.name}) in {config.train.init_from}; train both stages on one backbone"
        )
    for part in PARTS:
        if part in meta["trained_parts"] and part not in skip:
            if other_config[part].to_dict() != config[part].to_dict():
                raise ValueError(
                    f"config.{part}: expected the settings of {config.train.init_from} "
                    f"({other_config[part].to_dict()}), found {config[part].to_dict()}"
                )
            nnx.update(getattr(model, part), nnx.state(getattr(other, part)))
    if "rla" not in skip:
        model.latent_scale.set_value(other.latent_scale.get_value())
    return meta["trained_parts"]


def load_world_model(
    workdir: str | Path, *, step: int | None = None, with_backbone: bool = False, mesh: Mesh | None = None
) -> tuple[WorldModel, ConfigDict, dict[str, Any]]:
    """(model, config, meta) of a run's newest intact checkpoint, or of `step`, on `mesh` (default: one device).

    with_backbone=True also loads the backbone's weights and refuses others than those it was trained on.
    """
    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        step = checkpoints.latest_intact() if step is None else step
        if step not in checkpoints.steps:
            raise FileNotFoundError(f"{workdir}: expected a checkpoint of step {step}, found {checkpoints.steps}")
        meta = checkpoints.meta(step)
        config = config_from_meta(meta)
        backbone = None
        if with_backbone:
            dtype = compute_dtype(config.dtype)
            backbone, fingerprint = load_backbone(config.backbone.name, config.backbone.weights, dtype=dtype)
            if fingerprint != meta["fingerprint"]:
                raise ValueError(
                    f"config.backbone.weights: expected the backbone {meta['fingerprint']} that {workdir} was trained "
                    f"on, found {fingerprint} in {config.backbone.weights}; its tokens would mean something else"
                )
        mesh = mesh or make_mesh(1, 1, 1, jax.local_devices()[:1])
        skeleton = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
        graphdef, params, frozen = split_model(skeleton, list(make_objectives(config)))
        # of the training state, what the model is: the optimizer's moments stay where they are
        trained = {"params": params, "latent_scale": jax.ShapeDtypeStruct((), jnp.float32)}
        arrays = checkpoints.arrays(
            step, partial=True, **{STATE: _placed(trained, mesh), FROZEN: _placed(frozen, mesh)}
        )
        trained = arrays[STATE]
        model = join_model(graphdef, trained["params"], arrays[FROZEN], trained["latent_scale"])
        if backbone is not None:
            model.backbone = backbone
        return model, config, meta | {"step": step}
    finally:
        checkpoints.close()


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, tree_shardings(tree, mesh)
    )


def ensure_token_caches(config: ConfigDict, stores: list[EpisodeStore], backbone: DinoViT, fingerprint: str) -> None:
    """Compute the tokens of every dataset that has none yet, or finish an interrupted computation.

    Of several processes the first computes them; all read them, so `data.token_root` must be a folder they share.
    """
    graphdef, weights = nnx.split(backbone)

    @jax.jit
    def encode(weights, frames):
        return nnx.merge(graphdef, weights)(frames.astype(jnp.float32) / 255.0)

    def compute() -> None:
        for store in stores:
            build_token_cache(
                store,
                lambda frames: np.asarray(encode(weights, frames)),
                backbone=config.backbone.name,
                fingerprint=fingerprint,
                out_dir=token_cache_dir(config.data.token_root, store, fingerprint),
            )

    once(compute)


def provenance(config: ConfigDict) -> dict[str, Any]:
    """What made this run: config, command line, git revision, package versions, machine."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        git = "unknown"
    devices, hosts = jax.devices(), jax.process_count()
    return {
        "config": config.to_json_best_effort(),
        "command": " ".join(sys.argv),
        "git": git,
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{len(devices)} x {devices[0].device_kind}, {hosts} x {os.cpu_count()} cores",
    }
