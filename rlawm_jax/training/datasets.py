"""What a model asks of the datasets that it meets (data/datasets.py): frames of its size, robots that it knows, tokens.

Training, cloning, and reinforcement learning all go through these three.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from data.datasets import Datasets
from rlawm_jax.hosts import once
from rlawm_jax.models.vit import DinoViT


def check_image_size(datasets: Datasets, size: int, field: str) -> None:
    """Raise ValueError, naming the `field` that says `size`, where a dataset's frames are not of size x size pixels."""
    for store in datasets.stores.values():
        if store.image_size != (size, size):
            raise ValueError(
                f"{field}: expected {store.image_size[0]} as in the frames of {store.reference}, "
                f"found {size}; change it, or build the data with --image_size={size}"
            )


def check_robots(datasets: Datasets, action_dims: Mapping[str, int]) -> None:
    """Raise ValueError where a dataset has a robot that the denoiser has no action encoder for."""
    for store in datasets.stores.values():
        robots = {str(robot) for robot in store.robot_ids if robot >= 0}
        if missing := sorted(robots - set(action_dims)):
            raise ValueError(
                f"config.denoiser.action_dims: expected an entry for each robot of {store.reference}, found none for "
                f"robot {', '.join(missing)}; its actions would be ignored"
            )


def open_tokens(
    datasets: Datasets, token_root: str, fingerprint: str, load: Callable[[], DinoViT], *, backbone: str
) -> None:
    """Open the cached tokens of all datasets; first `load` the backbone and compute them where any are missing.

    Of several processes the first computes them; all read them, so `token_root` must be a folder they share.
    """
    if not datasets.has_tokens(token_root, fingerprint):
        encode = encoder(load())
        once(lambda: datasets.compute_tokens(token_root, fingerprint, encode, backbone=backbone))
    datasets.open_tokens(token_root, fingerprint)


def encoder(backbone: DinoViT) -> Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n l c"]]:
    """Frames to tokens on the host, compiled once for each size of a batch."""
    graphdef, weights = nnx.split(backbone)

    @jax.jit
    def encode(weights: nnx.State, frames: Any) -> Any:
        return nnx.merge(graphdef, weights)(frames.astype(jnp.float32) / 255.0)

    return lambda frames: np.asarray(encode(weights, frames))
