"""Which kernel computes softmax(q k / sqrt(d)) v: XLA's two products, cuDNN's fused kernel, or the TPU's flash kernel.

Fused kernels never store the scores [b, heads, l, s], which at 1056 tokens and 16 heads are 71 MB of float32 a sample.
All of them keep softmax in float32. Shapes: b batch, l queries, s keys, h heads, d head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlawm_jax.sharding import on_own_heads

KERNELS = ("auto", "xla", "cudnn", "flash")
FLASH_BLOCK = 128  # tokens; the flash kernel takes multiples of it


def check_attention(name: str) -> None:
    """Raise ValueError for a name that is not among `KERNELS`."""
    if name not in KERNELS:
        raise ValueError(f"config.attention: expected one of {', '.join(KERNELS)}, found {name!r}")


def attend(
    query: Float[Array, "b l h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"], kernel: str
) -> Float[Array, "b l h d"]:
    """Attention by the kernel `kernel`. ValueError if it is cuDNN's and does not take such arrays."""
    if kernel == "auto":
        # never `flash`: no TPU was at hand to time it
        kernel = "xla" if cudnn_refuses(query, jax.devices()[0]) else "cudnn"
    if kernel == "flash":
        # of fewer tokens most would be padding
        kernel = "xla" if min(query.shape[1], key.shape[1]) < FLASH_BLOCK else kernel
    if kernel == "flash":
        return on_own_heads(_flash, query, key, value)
    if kernel == "cudnn" and (reason := cudnn_refuses(query, None)):
        raise ValueError(f"config.attention=cudnn: expected {reason}; use config.attention=auto")
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if kernel == "cudnn" else "xla")


def cudnn_refuses(query: Any, device: Any | None) -> str:
    """What cuDNN's kernel would want and not find, in words, or "" if it takes `query` (on `device`, where given)."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"config.dtype=bfloat16, found {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"heads whose width is a multiple of 8 and at most 128, found {query.shape[-1]}"
    # AMD's GPUs name an architecture there (gfx90a)
    capability = "8.0" if device is None else str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    return "" if major.isdecimal() and int(major) >= 8 else "an NVIDIA GPU of compute capability 8.0 or newer"


def _flash(
    query: Float[Array, "b l h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b l h d"]:
    """The TPU's kernel over tokens padded to whole blocks; no query reads a key of the padding."""
    # a third of a second to import
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    padded = [jnp.pad(x, ((0, 0), (0, -x.shape[1] % FLASH_BLOCK), (0, 0), (0, 0))) for x in (query, key, value)]
    rows, tokens, real = query.shape[0], padded[0].shape[1], jnp.arange(padded[1].shape[1]) < key.shape[1]
    ids = SegmentIds(jnp.ones((rows, tokens), jnp.int32), jnp.broadcast_to(real.astype(jnp.int32), (rows, real.size)))
    y = flash_attention(*(x.swapaxes(1, 2) for x in padded), segment_ids=ids, sm_scale=query.shape[-1] ** -0.5)
    return y.swapaxes(1, 2)[:, : query.shape[1]]
