"""Named random streams: every draw is keyed by (seed, stream, step, ids...), never by device or worker."""

import zlib

import jax
from jaxtyping import Array


def stream(key: Array, name: str, *ids: int | Array) -> Array:
    """The key of stream `name` under `key`, folded with each id in order (step, window, environment...)."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key


def per_sample(key: Array, ids: Array) -> Array:
    """One key per id, so that a sample's noise depends on its id and not on its position in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
