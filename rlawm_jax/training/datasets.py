"""The datasets of a run, opened and checked against its model, and the tokens of their frames."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data.episodes import EpisodeStore
from data.tokens import build_token_cache, token_cache_dir
from rlawm_jax.hosts import once
from rlawm_jax.models.vit import DinoViT


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
