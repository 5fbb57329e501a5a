"""ResNet with GroupNorm, trained from scratch: the image encoder of a pixel policy (METHOD.md section 8).

With widths (64, 128, 256, 512) and blocks (2, 2, 2, 2) it is torchvision's ResNet-18 without the classifier, with
GroupNorm(channels / 16) in place of BatchNorm.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rlawm_jax.models.lora import Conv, LowRank

GROUP_WIDTH = 16  # channels per group


def group_norm(width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over groups of 16 channels, or over fewer, larger groups where 16 does not divide the width."""
    groups = math.gcd(max(1, width // GROUP_WIDTH), width)
    return nnx.GroupNorm(width, num_groups=groups, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)


class BasicBlock(nnx.Module):
    """conv-GN-ReLU-conv-GN, plus the input (through a 1x1 convolution and GN where the shape changes), ReLU."""

    def __init__(self, in_dim: int, width: int, stride: int, *, low_rank: LowRank, dtype: Any, rngs: nnx.Rngs):
        common = {"low_rank": low_rank, "dtype": dtype, "rngs": rngs}
        self.conv1, self.norm1 = Conv(in_dim, width, 3, stride, **common), group_norm(width, rngs=rngs)
        self.conv2, self.norm2 = Conv(width, width, 3, 1, **common), group_norm(width, rngs=rngs)
        self.shortcut, self.shortcut_norm = nnx.data(None), nnx.data(None)
        if stride != 1 or in_dim != width:
            self.shortcut, self.shortcut_norm = Conv(in_dim, width, 1, stride, **common), group_norm(width, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b g v o"]:
        y = jax.nn.relu(self.norm1(self.conv1(x)).astype(x.dtype))
        y = self.norm2(self.conv2(y)).astype(x.dtype)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x)).astype(x.dtype)
        return jax.nn.relu(x + y)


class ResNet(nnx.Module):
    """Images to a feature map: 7x7 stem and max-pool, then stages of basic blocks; four stages give 1/32."""

    def __init__(self, *, widths: Sequence[int], blocks: Sequence[int], low_rank: LowRank, dtype: Any, rngs: nnx.Rngs):
        if len(widths) != len(blocks) or not widths or min(widths) < 2 or min(blocks) < 1:
            raise ValueError(
                f"config.policy.widths, blocks: expected as many widths (2 or more) as block counts (1 or more), "
                f"found {tuple(widths)} and {tuple(blocks)}"
            )
        common = {"low_rank": low_rank, "dtype": dtype, "rngs": rngs}
        self.dtype = dtype
        self.stride = 2 ** (len(widths) + 1)  # pixels per cell of the map; a partial cell counts
        self.stem, self.stem_norm = Conv(3, widths[0], 7, 2, **common), group_norm(widths[0], rngs=rngs)
        stages, in_dim = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for i in range(depth):
                layers.append(BasicBlock(in_dim, width, 2 if stage > 0 and i == 0 else 1, **common))
                in_dim = width
            stages.append(nnx.List(layers))
        self.stages = nnx.List(stages)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b g v o"]:
        x = images.astype(self.dtype)
        x = jax.nn.relu(self.stem_norm(self.stem(x)).astype(self.dtype))
        # torch pads both sides; "SAME" at stride 2 pads the far side of an even map only
        around: Any = ((1, 1), (1, 1))  # flax's annotation allows names only
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=around)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x
