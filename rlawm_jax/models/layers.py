"""Building blocks shared by every network: attention, MLP, AdaLN, time embedding, a torch-exact GRU, a layer stack.

Shapes: b batch, l sequence, c width, h heads. Parameters are float32; matmuls run in `dtype`; LayerNorm statistics,
softmax, time embedding and GRU run in float32 whatever `dtype` is. Epsilons, GELU and gate order are those of PyTorch
(METHOD.md section 11).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlawm_jax.models.attention import attend, check_attention
from rlawm_jax.sharding import keep_rows

# PyTorch's; flax's is 1e-6
LAYER_NORM_EPS = 1e-5

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # keeps products with weights but not attention scores, which are quadratic in the sequence length
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# without it accelerators round the factors of a float32 product: to bfloat16 on TPUs, to TF32 on recent GPUs
EXACT = jax.lax.Precision.HIGHEST

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check_remat(remat: str) -> None:
    """Raise ValueError for a name that is not among `REMAT_POLICIES`."""
    if remat not in REMAT_POLICIES:
        raise ValueError(f"config.remat: expected one of {', '.join(REMAT_POLICIES)}, found {remat!r}")


def rematerialised(block: Callable[..., Any], remat: str, *, prevent_cse: bool = True) -> Callable[..., Any]:
    """`block`, recomputing its activations for the gradient except those that the policy `remat` keeps."""
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)


def compute_dtype(name: str) -> Any:
    """The matmul dtype named in a config; parameters stay float32."""
    if name not in DTYPES:
        raise ValueError(f"config.dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name]


# not a Param: optimizers and conversion handle Params only
class Statistic(nnx.Variable):
    """A number measured on data and stored with the model (action limits, latent scale); never trained."""


class Linear(nnx.Linear):
    """`nnx.Linear` as one matrix product over all leading axes: its gradient, with two batch axes, is slow on CPUs."""

    def __call__(self, inputs: Float[Array, "... i"], out_sharding: Any = None) -> Float[Array, "... o"]:
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding=out_sharding)
        return flat.reshape(*inputs.shape[:-1], -1)


def linear(
    in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs, bias: bool = True, init=None, precision: Any = None
) -> Linear:
    """A linear layer, Xavier-uniform kernel [in, out] unless `init` says otherwise, zero bias."""
    return Linear(
        in_dim,
        out_dim,
        use_bias=bias,
        dtype=dtype,
        precision=precision,
        kernel_init=init or nnx.initializers.xavier_uniform(),
        rngs=rngs,
    )


def exact_linear(in_dim: int, out_dim: int, *, rngs: nnx.Rngs, init=None) -> Linear:
    """A linear layer in float32 whose factors no accelerator rounds: for small products that matter."""
    return linear(in_dim, out_dim, dtype=jnp.float32, rngs=rngs, init=init, precision=EXACT)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU in float32, rounded to the dtype of `x`; jax.nn.gelu uses erfc, three times slower on a CPU."""

    def exact(x: Array) -> Array:
        y = x.astype(jnp.float32)
        # 1 + erf in bfloat16 would be 0 for every x below -3
        return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)

    # a narrow input is kept for the gradient in its own dtype, rather than three factors in float32
    return exact(x) if x.dtype == jnp.float32 else jax.checkpoint(exact)(x)


def layer_norm(x: Float[Array, "... c"], eps: float = LAYER_NORM_EPS) -> Float[Array, "... c"]:
    """LayerNorm without parameters, statistics in float32, result in the dtype of `x`."""
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    # two passes: E[y^2] - E[y]^2, as flax computes it, suffers from cancellation where the mean is large
    var = jnp.square(y - mean).mean(axis=-1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with scale and bias, statistics in float32."""

    def __init__(self, width: int, *, eps: float = LAYER_NORM_EPS):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        # scale and bias act before the result is rounded to the dtype of x
        y = layer_norm(x.astype(jnp.float32), self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with separate query, key, value and output projections.

    `kv_width` differs from `width` for cross-attention. Keys and values can be computed separately (`keys_values`), so
    that a condition that does not change is projected only once. `attention` names the kernel (`models/attention.py`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_width: int | None = None,
        query_bias: bool = True,
        key_bias: bool = True,
        value_bias: bool = True,
        dtype: Any,
        attention: str = "xla",
        rngs: nnx.Rngs,
    ):
        check_attention(attention)
        if width % heads:
            raise ValueError(f"attention width {width} is not a multiple of its {heads} heads")
        kv_width = kv_width or width
        self.heads, self.kernel = heads, attention
        # torch packs the first three into one. Separately, keys and values of a condition are computed once, and a
        # split of the columns over `tensor` falls between heads
        self.query = linear(width, width, bias=query_bias, dtype=dtype, rngs=rngs)
        self.key = linear(kv_width, width, bias=key_bias, dtype=dtype, rngs=rngs)
        self.value = linear(kv_width, width, bias=value_bias, dtype=dtype, rngs=rngs)
        self.out = linear(width, width, dtype=dtype, rngs=rngs)

    def _split(self, x: Float[Array, "b l c"]) -> Float[Array, "b l h d"]:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def keys_values(self, source: Float[Array, "b s c"]) -> tuple[Array, Array]:
        """Keys and values of `source`, each [b, s, heads, head_dim]."""
        return self._split(self.key(source)), self._split(self.value(source))

    def attend(
        self,
        x: Float[Array, "b l c"],
        keys_values: tuple[Array, Array],
        rotate: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "b l c"]:
        """Attention of `x` over given keys and values. `rotate` (RoPE) is applied to queries and keys."""
        query, (key, value) = self._split(self.query(x)), keys_values
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        y = attend(query, key, value, self.kernel)
        return self.out(y.reshape(x.shape))

    def __call__(
        self, x: Float[Array, "b l c"], rotate: Callable[[Array], Array] | None = None
    ) -> Float[Array, "b l c"]:
        return self.attend(x, self.keys_values(x), rotate)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.up = linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """Pre-norm transformer block: parameter-free LayerNorm, self-attention, MLP (METHOD.md section 3)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, dtype: Any, attention: str = "xla", rngs: nnx.Rngs):
        self.attn = Attention(width, heads, dtype=dtype, attention=attention, rngs=rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        x = x + self.attn(layer_norm(x))
        return x + self.mlp(layer_norm(x))


def modulate(x: Float[Array, "b l c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"]) -> Array:
    """LN(x) * (1 + scale) + shift, one shift and scale per sample."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


class Modulation(nnx.Module):
    """Six vectors (shift, scale, gate for attention, then for the MLP) from SiLU(vec); starts at zero."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        # zero, so that both gates of a new block are closed
        self.linear = linear(width, 6 * width, dtype=dtype, rngs=rngs, init=nnx.initializers.zeros)

    def __call__(self, vec: Float[Array, "b c"]) -> list[Float[Array, "b c"]]:
        # computed with columns split over `tensor`; without `keep_rows` the modulated tokens would take that layout too
        return jnp.split(keep_rows(self.linear(jax.nn.silu(vec))), 6, axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoid of 1000 t (cosines first, max period 10000), then Linear-SiLU-Linear with init std 0.02; float32."""

    def __init__(self, width: int, *, frequencies: int = 256, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.frequencies = frequencies
        self.up = exact_linear(frequencies, width, rngs=rngs, init=init)
        self.down = exact_linear(width, width, rngs=rngs, init=init)

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b c"]:
        half = self.frequencies // 2
        rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
        # float32: bfloat16 resolves an angle near 1000 only to 4
        angles = 1000.0 * t.astype(jnp.float32)[:, None] * rates
        wave = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.down(jax.nn.silu(self.up(wave)))


class GRU(nnx.Module):
    """PyTorch's GRU over a padded sequence: gates r, z, n; the hidden bias of n sits inside the reset gate.

    n = tanh(W_in x + b_in + r * (W_hn h + b_hn)); h' = (1 - z) * n + z * h. flax's cell has no hidden bias.
    """

    def __init__(self, in_dim: int, hidden: int, *, rngs: nnx.Rngs):
        # torch draws all four parameters from U(-1/sqrt(hidden), 1/sqrt(hidden))
        bound = hidden**-0.5

        def uniform(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

        self.hidden = hidden
        self.input_kernel = uniform(in_dim, 3 * hidden)
        self.hidden_kernel = uniform(hidden, 3 * hidden)
        self.input_bias = uniform(3 * hidden)
        self.hidden_bias = uniform(3 * hidden)

    def __call__(self, x: Float[Array, "b t i"], lengths: Int[Array, " b"]) -> Float[Array, "b c"]:
        """The hidden state after the last valid row of each sequence; zeros where a length is 0."""
        # for all rows at once, outside the scan: only the hidden state's product depends on the previous row
        gates_x = jnp.matmul(x.astype(jnp.float32), self.input_kernel[...], precision=EXACT) + self.input_bias[...]
        valid = jnp.arange(x.shape[1])[:, None] < lengths[None, :]
        kernel, bias = self.hidden_kernel[...], self.hidden_bias[...]

        def step(h, row):
            gate_x, keep = row
            reset_x, update_x, new_x = jnp.split(gate_x, 3, axis=-1)
            reset_h, update_h, new_h = jnp.split(jnp.matmul(h, kernel, precision=EXACT) + bias, 3, axis=-1)
            reset, update = jax.nn.sigmoid(reset_x + reset_h), jax.nn.sigmoid(update_x + update_h)
            new = jnp.tanh(new_x + reset * new_h)
            # padded rows leave the state unchanged, so the state after the last valid row is returned, as with torch's
            # packed sequences
            return jnp.where(keep[:, None], (1 - update) * new + update * h, h), None

        start = jnp.zeros((x.shape[0], self.hidden), jnp.float32)
        return jax.lax.scan(step, start, (gates_x.swapaxes(0, 1), valid))[0]


class Stack(nnx.Module):
    """`depth` blocks of one kind: parameters stacked on a leading layer axis, applied by one `lax.scan`.

    Compile time does not grow with depth, and rematerialisation is per block, by policy name (`REMAT_POLICIES`). On a
    mesh, inputs and outputs of every block keep their rows on the devices that hold them (`sharding.keep_rows`).
    """

    def __init__(
        self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, remat: str = "none", rngs: nnx.Rngs
    ):
        check_remat(remat)
        self.depth, self.remat = depth, remat
        skeleton = nnx.graphdef(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))
        keys = jax.random.split(rngs.params(), depth)
        self.blocks = nnx.merge(skeleton, jax.vmap(lambda key: nnx.state(make_block(nnx.Rngs(key))))(keys))

    def __call__(self, x: Array, *shared: Any, per_layer: Any = None, method: str = "__call__") -> Array:
        """Apply the blocks in order: block.method(x, *shared), or block.method(x, *shared, slice) with `per_layer`."""
        graphdef, state = nnx.split(self.blocks)

        def body(x, layer):
            params, extra = layer
            block = getattr(nnx.merge(graphdef, params), method)
            x = block(x, *shared) if per_layer is None else block(x, *shared, extra)
            return keep_rows(x), None

        body = rematerialised(body, self.remat, prevent_cse=False)  # not needed inside a scan
        # a short stack is unrolled: the loop costs more than it saves
        return jax.lax.scan(body, keep_rows(x), (state, per_layer), unroll=self.depth if self.depth <= 4 else 1)[0]

    def each(self, x: Array, method: str) -> Any:
        """block.method(x) of every block on the same input, results stacked on a leading layer axis."""
        graphdef, state = nnx.split(self.blocks)
        return jax.lax.map(lambda params: getattr(nnx.merge(graphdef, params), method)(x), state)
