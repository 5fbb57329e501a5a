"""From a config and a run folder to everything the loop needs: data, model, optimizer, compiled step."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data.pipeline import TrainIterator, WindowBatches, WindowLoader, action_limits, open_datasets
from rlawm_jax.flow import Sampler
from rlawm_jax.hosts import on_first_process
from rlawm_jax.image_metrics import load_lpips
from rlawm_jax.models.layers import Statistic, compute_dtype
from rlawm_jax.models.normaliser import affine_from_limits
from rlawm_jax.models.vit import DinoViT
from rlawm_jax.objectives import Objective
from rlawm_jax.rng import stream
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.run_folder.provenance import provenance
from rlawm_jax.sharding import batch_share, check_batch_size, make_mesh, place, tree_shardings
from rlawm_jax.training.held_out import HeldOut
from rlawm_jax.training.restore import inherit_parts
from rlawm_jax.training.run import Run
from rlawm_jax.training.state import place_state, split_model
from rlawm_jax.training.step import TrainStep, make_objectives, make_train_step, make_transforms
from rlawm_jax.weights.backbone import frame_encoder, load_backbone
from rlawm_jax.world_model import PARTS, WorldModel

ACTION_STATISTICS = ("none", "limits")


def prepare(config: ConfigDict, workdir: Path) -> Run:
    """Open the data, load or initialise every part, and build the training step of `config`.

    Errors name the faulty key or file; nothing is written to `workdir`.
    """
    objectives = make_objectives(config)
    transforms = make_transforms(config, objectives)
    Sampler(**config.sampler)  # training does not sample, but the trained model must be usable
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.data.batch_size, mesh, config.train.accumulate)

    loader, backbone, fingerprint = open_data(config, with_frames="image_decoder" in objectives)
    model, trained_before = build_model(config, loader, backbone, fingerprint, mesh=mesh, train=list(objectives))
    graphdef, params, frozen = split_model(model, list(objectives))
    frozen = place(frozen, mesh)  # statistics were measured on the host
    state = place_state(params, transforms, model.latent_scale.get_value(), mesh)
    step = configured_step(config, graphdef, objectives, transforms)
    batches = WindowBatches(loader, "train", *batch_share(mesh))
    meta = provenance(config) | {
        "fingerprint": fingerprint,
        "trained_parts": [part for part in PARTS if part in objectives or part in trained_before],
    }
    validation = HeldOut(config, graphdef, loader, mesh) if "denoiser" in objectives else None
    return Run(config, mesh, TrainIterator(batches, "train"), state, frozen, step, meta, validation=validation)


def open_data(config: ConfigDict, *, with_frames: bool) -> tuple[WindowLoader, DinoViT, str]:
    """The config's datasets, checked and with their tokens computed; the backbone that reads them; its fingerprint."""
    datasets = open_datasets(config.data)
    datasets.check_image_size(config.backbone.image_size, "config.backbone.image_size")
    datasets.check_robots(config.denoiser.action_dims)
    name, weights = config.backbone.name, config.backbone.weights
    dtype, attention = compute_dtype(config.dtype), config.attention
    backbone, fingerprint = load_backbone(name, weights, dtype=dtype, attention=attention)
    if config.data.source == "tokens":
        make_encoder = partial(frame_encoder, backbone)
        datasets.compute_tokens(
            config.data.token_root, fingerprint, make_encoder, backbone=name, alone=on_first_process
        )
    loader = WindowLoader(config.data, fingerprint=fingerprint, with_frames=with_frames, datasets=datasets)
    return loader, backbone, fingerprint


def build_model(
    config: ConfigDict, loader: WindowLoader, backbone: DinoViT, fingerprint: str, *, mesh: Mesh, train: list[str]
) -> tuple[WorldModel, list[str]]:
    """A world model ready to train the parts `train`, and the parts that an earlier run has trained.

    Parameters are new, or from the run config.train.init_from; action statistics are measured on the loader's data.
    """
    model = init_model(config, mesh, backbone if config.data.source == "frames" else None)
    set_action_statistics(model, config, loader)
    set_lpips(model, config, "image_decoder" in train)
    return model, inherit_parts(model, config, fingerprint, mesh=mesh, skip=train)


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
    """A world model with new parameters, each created in its final sharding: no unsharded copy ever exists."""

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


def set_action_statistics(model: WorldModel, config: ConfigDict, loader: WindowLoader) -> None:
    """Store the action encoders' scale and offset for raw rows (config.data.action_statistics)."""
    kind = config.data.action_statistics
    if kind not in ACTION_STATISTICS:
        raise ValueError(f"config.data.action_statistics: expected one of {ACTION_STATISTICS}, found {kind!r}")
    width = loader.action_dim
    widest = max(config.denoiser.action_dims.values())
    if width < widest:
        raise ValueError(f"config.denoiser.action_dims: expected at most {width} (the data's), found {widest}")
    if kind == "none":
        return
    scale, offset = affine_from_limits(*action_limits(loader))
    for encoder in model.denoiser.action_encoders.values():
        encoder.scale.set_value(jnp.asarray(scale[: encoder.action_dim], jnp.float32))
        encoder.offset.set_value(jnp.asarray(offset[: encoder.action_dim], jnp.float32))


def set_lpips(model: WorldModel, config: ConfigDict, needed: bool) -> None:
    """Load the LPIPS network if one is configured; announce it if a loss has to run without."""
    if config.lpips_weights:
        model.lpips = Statistic(load_lpips(config.lpips_weights))
    elif needed:
        announce("the image decoder's LPIPS term is off: config.lpips_weights is empty")
