"""Linear and convolution with an optional low-rank branch: y = W x + (alpha / rank) * B A x (LoRA, arXiv 2106.09685).

B starts at zero, so a new branch changes nothing. For a convolution, A has the kernel, stride and padding of W and B is
1x1, as in PEFT, whose names the release's checkpoints use.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from rlawm_jax.models.convolution import convolve
from rlawm_jax.models.layers import linear

# torch's default for a layer without bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
A_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# torchvision's ResNet: Kaiming normal by fan out
CONV_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclass(frozen=True)
class LowRank:
    """Rank of the low-rank branches (0: none) and their alpha; the branch is multiplied by alpha / rank."""

    rank: int = 0
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"config.policy.residual: expected lora_rank >= 0 and lora_alpha > 0, "
                f"found lora_rank={self.rank}, lora_alpha={self.alpha}"
            )


NO_LORA = LowRank()


class Branch(nnx.Module):
    """The low-rank branch itself: B A x, scaled."""

    def __init__(self, a: nnx.Module, b: nnx.Module, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Array) -> Array:
        return self.scale * self.b(self.a(x))


class Linear(nnx.Module):
    """A linear layer, with a low-rank branch where `low_rank.rank` is positive."""

    def __init__(self, in_dim: int, out_dim: int, *, low_rank: LowRank, init=None, dtype: Any, rngs: nnx.Rngs):
        self.base = linear(in_dim, out_dim, dtype=dtype, rngs=rngs, init=init)
        self.lora = nnx.data(None)
        if low_rank.rank:
            a = linear(in_dim, low_rank.rank, bias=False, dtype=dtype, rngs=rngs, init=A_INIT)
            b = linear(low_rank.rank, out_dim, bias=False, dtype=dtype, rngs=rngs, init=nnx.initializers.zeros)
            self.lora = Branch(a, b, low_rank.alpha / low_rank.rank)

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = self.base(x)
        return y if self.lora is None else y + self.lora(x)


class Conv(nnx.Module):
    """A square convolution without bias, padded by (kernel - 1) / 2 on every side as in torchvision."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int, stride: int, *, low_rank: LowRank, dtype: Any, rngs: nnx.Rngs
    ):
        def conv(in_dim: int, out_dim: int, kernel: int, stride: int, init: Any) -> nnx.Conv:
            return nnx.Conv(
                in_dim,
                out_dim,
                (kernel, kernel),
                strides=stride,
                padding=(kernel - 1) // 2,
                use_bias=False,
                dtype=dtype,
                kernel_init=init,
                conv_general_dilated=convolve,
                rngs=rngs,
            )

        self.base = conv(in_dim, out_dim, kernel, stride, CONV_INIT)
        self.lora = nnx.data(None)
        if low_rank.rank:
            a = conv(in_dim, low_rank.rank, kernel, stride, A_INIT)
            b = conv(low_rank.rank, out_dim, 1, 1, nnx.initializers.zeros)
            self.lora = Branch(a, b, low_rank.alpha / low_rank.rank)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b g v o"]:
        y = self.base(x)
        return y if self.lora is None else y + self.lora(x)
