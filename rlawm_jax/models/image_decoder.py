"""Convolutional decoder from patch tokens to RGB (METHOD.md 5): frames, image metrics, pixel policy observations."""

import math
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rlawm_jax.models.convolution import convolve
from rlawm_jax.models.layers import check_remat, gelu, rematerialised
from rlawm_jax.sharding import keep_rows

GROUPS = 8


def _conv(in_dim: int, out_dim: int, *, init=None, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    kernel_init = init or nnx.initializers.he_uniform()
    return nnx.Conv(
        in_dim,
        out_dim,
        (3, 3),
        padding=1,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def _output_init(gain: float):
    """Zeros as released, or He-uniform times `gain`.

    From zeros, a few steps at a high rate make the three columns equal where almost every pixel is grey. Then no
    gradient tells colours apart: features stay grey, and L1 paints a small green object black, its channels' median.
    """
    he = nnx.initializers.he_uniform()
    return (lambda *args: gain * he(*args)) if gain else nnx.initializers.zeros


def _group_norm(width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    # in the last stages of small decoders the width falls below the release's 8 groups
    return nnx.GroupNorm(width, num_groups=math.gcd(GROUPS, width), epsilon=1e-5, dtype=jnp.float32, rngs=rngs)


class ResidualBlock(nnx.Module):
    """conv-GroupNorm-GELU-conv-GroupNorm, add, GELU."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv1, self.norm1 = _conv(width, width, dtype=dtype, rngs=rngs), _group_norm(width, rngs=rngs)
        self.conv2, self.norm2 = _conv(width, width, dtype=dtype, rngs=rngs), _group_norm(width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = gelu(self.norm1(self.conv1(x)).astype(x.dtype))
        return keep_rows(gelu(x + self.norm2(self.conv2(y)).astype(x.dtype)))


class Upsample(nnx.Module):
    """Transposed convolution with kernel = stride = 2: every pixel becomes a 2x2 square, no overlap."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0, out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (in_dim, 2, 2, out_dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b 2*h 2*w o"]:
        b, h, w, _ = x.shape
        # one matrix product: with kernel = stride every output depends on a single pixel
        y = jnp.einsum("bhwi,ipqo->bhpwqo", x, self.kernel[...].astype(self.dtype))
        return y.reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)


class ImageDecoder(nnx.Module):
    """Tokens [b, h_p * w_p, c] to images [b, h_p * patch, w_p * patch, 3], nominally in [0, 1] (not clipped).

    Each of `stages` doubles the sides: the released four give 16 pixels per patch side. Where that is not the patch
    size (DINOv2's is 14) the image is resized bilinearly at the end, so that the parameters do not depend on it. Fewer
    stages paint less detail in less time: each works on four times the pixels of the one before.
    """

    def __init__(
        self,
        *,
        token_width: int,
        grid: tuple[int, int],
        patch: int,
        width: int,
        stages: int = 4,
        output_gain: float = 0.0,
        remat: str = "none",
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        if stages < 1:
            raise ValueError(f"config.image_decoder.stages: expected 1 or more, found {stages}")
        if width % 2**stages:
            raise ValueError(f"config.image_decoder.width: expected a multiple of {2**stages}, found {width}")
        self.grid, self.patch, self.remat, self.dtype = grid, patch, remat, dtype
        self.conv_in = _conv(token_width, width, dtype=dtype, rngs=rngs)
        self.norm_in = _group_norm(width, rngs=rngs)
        self.blocks_in = nnx.List([ResidualBlock(width, dtype=dtype, rngs=rngs) for _ in range(2)])
        widths = [width // 2**i for i in range(stages + 1)]
        self.ups = nnx.List([Upsample(a, b, dtype=dtype, rngs=rngs) for a, b in pairwise(widths)])
        self.up_blocks = nnx.List(
            [nnx.List([ResidualBlock(w, dtype=dtype, rngs=rngs) for _ in range(2)]) for w in widths[1:]]
        )
        self.block_out = ResidualBlock(widths[-1], dtype=dtype, rngs=rngs)
        self.conv_out = _conv(widths[-1], 3, init=_output_init(output_gain), dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b l c"]) -> Float[Array, "b h w 3"]:
        h, w = self.grid
        if tokens.shape[1] != h * w:
            raise ValueError(f"image decoder: expected {h}x{w}={h * w} tokens, found {tokens.shape[1]}")
        x = keep_rows(tokens).astype(self.dtype).reshape(tokens.shape[0], h, w, -1)
        x = gelu(self.norm_in(self.conv_in(x)).astype(self.dtype))
        # rematerialised per block: these maps, especially the large ones, take most of the training step's memory
        for block in self.blocks_in:
            x = rematerialised(block, self.remat)(x)
        for up, blocks in zip(self.ups, self.up_blocks, strict=True):
            x = up(x)
            for block in blocks:
                x = rematerialised(block, self.remat)(x)
        # not clipped: a pixel clipped to [0, 1] would have no gradient
        rgb = self.conv_out(rematerialised(self.block_out, self.remat)(x)).astype(jnp.float32)
        shape = (rgb.shape[0], h * self.patch, w * self.patch, 3)
        # without antialiasing, as torch's interpolate does (METHOD.md section 11)
        return rgb if rgb.shape == shape else jax.image.resize(rgb, shape, "linear", antialias=False)
