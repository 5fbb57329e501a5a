"""Load world models from run folders: whole, or the parts that another run starts from."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlawm_jax.models.layers import compute_dtype
from rlawm_jax.models.vit import DinoViT
from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer
from rlawm_jax.run_folder.config import config_from_meta
from rlawm_jax.sharding import make_mesh, tree_shardings
from rlawm_jax.training.state import join_model, split_model
from rlawm_jax.training.step import make_objectives
from rlawm_jax.weights.backbone import load_backbone
from rlawm_jax.world_model import PARTS, WorldModel


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
        inherited = other_config.latent_scale.per_dimension
        if inherited != config.latent_scale.per_dimension:
            raise ValueError(
                f"config.latent_scale.per_dimension: expected {inherited}, as in {config.train.init_from}, "
                f"found {config.latent_scale.per_dimension}"
            )
        model.latent_scale.set_value(other.latent_scale.get_value())
    return meta["trained_parts"]


def load_world_model(
    workdir: str | Path, *, step: int | None = None, with_backbone: bool = False, mesh: Mesh | None = None
) -> tuple[WorldModel, ConfigDict, dict[str, Any]]:
    """(model, config, meta) of a run's newest intact checkpoint, or of `step`, on `mesh` (default: one device).

    with_backbone=True also loads the backbone's weights and raises ValueError if the run was trained on others.
    """
    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        step = checkpoints.latest_intact() if step is None else step
        if step not in checkpoints.steps:
            raise FileNotFoundError(f"{workdir}: expected a checkpoint of step {step}, found {checkpoints.steps}")
        meta = checkpoints.meta(step)
        config = config_from_meta(meta)
        if "denoiser" not in config:
            raise ValueError(
                f"{workdir}: expected the run folder of a world model, found a policy's; name the run of its "
                f"world model instead ({config.world_model or 'this policy records none'})"
            )
        backbone = load_trained_backbone(config, meta["fingerprint"], workdir) if with_backbone else None
        mesh = mesh or make_mesh(1, 1, 1, jax.local_devices()[:1])
        skeleton = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
        graphdef, params, frozen = split_model(skeleton, list(make_objectives(config)))
        # only the model's part of the training state: the optimizer's moments are not read
        trained = {"params": params, "latent_scale": skeleton.latent_scale.get_value()}
        arrays = checkpoints.arrays(
            step, partial=True, **{STATE: _placed(trained, mesh), FROZEN: _placed(frozen, mesh)}
        )
        trained = arrays[STATE]
        model = join_model(graphdef, trained["params"], arrays[FROZEN], trained["latent_scale"])
        if backbone is not None:
            model.backbone = backbone
        return model, config, meta | {"step": step, "checksum": checkpoints.checksum(step)}
    finally:
        checkpoints.close()


def load_trained_backbone(config: ConfigDict, fingerprint: str, workdir: str | Path) -> DinoViT:
    """The backbone that the run `workdir` was trained on, given its config and fingerprint; ValueError for another."""
    dtype, attention = compute_dtype(config.dtype), config.attention
    backbone, found = load_backbone(config.backbone.name, config.backbone.weights, dtype=dtype, attention=attention)
    if found != fingerprint:
        raise ValueError(
            f"config.backbone.weights: expected the backbone {fingerprint} that {workdir} was trained on, "
            f"found {found} in {config.backbone.weights}; its tokens would mean something else"
        )
    return backbone


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, tree_shardings(tree, mesh)
    )
