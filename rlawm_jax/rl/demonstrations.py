"""The demonstration bank: every frame of every demonstration on the devices, so that imagination never leaves them.

All frames are in one long array, episode after episode, split over the mesh's data and fsdp axes; a lookup is a gather.
The stored format trades memory for computation:

| store | bytes per frame | a lookup costs |
|---|---|---|
| bfloat16 | 2 l c | a cast |
| int8 | l (c + 4), a float32 scale per token | a multiplication; error at most 1/254 of the token's largest channel |
| frames | 3 h w | a pass through the backbone |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlawm_jax.sharding import batch_sharding, put, replicated

STORES = ("bfloat16", "int8", "frames")
GIB = 2**30


class Bank(NamedTuple):
    """Demonstrations on the devices: `data` [n, ...] holds all frames (padded at the end), `scale` the int8 scales."""

    data: Array
    scale: Float[Array, "n l 1"] | None
    offset: Int[Array, " e"]  # first frame of each episode in `data`
    length: Int[Array, " e"]  # frames of each episode
    robot_id: Int[Array, " e"]


@dataclass(frozen=True)
class Demonstrations:
    """The source of a bank, still on the host: frames are read as needed.

    `read(frames)` gives tokens [n, l, c], or uint8 images [n, h, w, 3] for the store "frames", for frames numbered
    consecutively over all episodes.
    """

    lengths: Int[np.ndarray, " e"]
    robot_ids: Int[np.ndarray, " e"]
    shape: tuple[int, ...]  # of one frame: (l, c) or (h, w, 3)
    read: Callable[[np.ndarray], np.ndarray]
    actions: Sequence[Float[np.ndarray, "t a"]] = ()  # raw rows of each episode, replayed by `probe`
    # the raw row that holds still at each episode's first frame; None where the dataset does not say
    still: Sequence[Float[np.ndarray, " a"] | None] = ()


def frame_bytes(shape: tuple[int, ...], store: str) -> int:
    """Bytes of one frame in the bank."""
    if store not in STORES:
        raise ValueError(f"config.bank.store: expected one of {', '.join(STORES)}, found {store!r}")
    size = int(np.prod(shape))
    return {"bfloat16": 2 * size, "int8": size + 4 * shape[0], "frames": size}[store]


def plan(demonstrations: Demonstrations, store: str, mesh: Mesh, limit_gib: float) -> str:
    """The bank's memory use as one line; ValueError with the numbers where a device's share exceeds the limit.

    Nothing is allocated here.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    frames, each = int(demonstrations.lengths.sum()), frame_bytes(demonstrations.shape, store)
    share = -(-frames // parts) * each
    line = (
        f"demonstration bank: {len(demonstrations.lengths)} episodes, {frames} frames x {each} bytes "
        f"({' x '.join(map(str, demonstrations.shape))} as {store}) = {frames * each / GIB:.3f} GiB, "
        f"{share / GIB:.3f} GiB on each of {parts} devices"
    )
    if share > limit_gib * GIB:
        raise ValueError(
            f"{line}; expected at most config.bank.limit_gib = {limit_gib:g} GiB a device: use fewer demonstrations "
            f"(config.bank.episodes), a smaller config.bank.store, more devices on mesh.data, or raise the limit"
        )
    return line


def bank_spec(shape: tuple[int, ...], store: str, mesh: Mesh, *, frames: int, episodes: int) -> Bank:
    """Shapes and dtypes of a bank of `frames` frames of `shape`, padded so that they divide evenly over the devices."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    padded = -(-frames // parts) * parts
    dtype = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "frames": jnp.uint8}[store]
    scale = jax.ShapeDtypeStruct((padded, shape[0], 1), jnp.float32) if store == "int8" else None
    index = jax.ShapeDtypeStruct((episodes,), jnp.int32)
    make: Any = Bank  # filled with shapes instead of arrays
    return make(jax.ShapeDtypeStruct((padded, *shape), dtype), scale, index, index, index)


def build_bank(demonstrations: Demonstrations, store: str, mesh: Mesh) -> Bank:
    """Read the demonstrations onto the devices; each process reads its own devices' shares."""
    frames, episodes = int(demonstrations.lengths.sum()), len(demonstrations.lengths)
    spec = bank_spec(demonstrations.shape, store, mesh, frames=frames, episodes=episodes)
    padded = spec.data.shape[0]

    sharding = batch_sharding(mesh)
    on_devices = []  # per device: its part of the data and of the int8 scales
    indices: Any = sharding.addressable_devices_indices_map((padded,))
    for device, (part,) in indices.items():
        wanted = np.minimum(np.arange(*part.indices(padded)), frames - 1)
        on_devices.append([jax.device_put(x, device) for x in _stored(demonstrations.read(wanted), spec)])
    data, *scales = (
        jax.make_array_from_single_device_arrays((padded, *parts[0].shape[1:]), sharding, list(parts))
        for parts in zip(*on_devices, strict=True)
    )
    offsets = np.concatenate([[0], np.cumsum(demonstrations.lengths)[:-1]])
    columns = [np.asarray(x, spec.offset.dtype) for x in (offsets, demonstrations.lengths, demonstrations.robot_ids)]
    return Bank(data, scales[0] if scales else None, *put(columns, [replicated(mesh)] * len(columns)))


def _stored(frames: np.ndarray, spec: Bank) -> tuple[np.ndarray, ...]:
    """Frames as the bank stores them: in its dtype, with the scales for int8."""
    return (frames.astype(spec.data.dtype),) if spec.scale is None else _quantise(frames)


def _quantise(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens as int8 and one float32 scale each."""
    tokens = tokens.astype(np.float32)
    scale = np.maximum(np.abs(tokens).max(axis=-1, keepdims=True), 1e-12) / 127.0
    return np.rint(tokens / scale).astype(np.int8), scale.astype(np.float32)


def lookup(bank: Bank, model: Any, episode: Int[Array, " b"], frame: Int[Array, " b"]) -> Float[Array, "b l c"]:
    """Tokens of frame `frame` of demonstration `episode`; the world model encodes them where images are stored."""
    # some compilers hoist a cast of the whole bank out of a loop, unless it is a value computed inside the loop
    where, data = jax.lax.optimization_barrier((bank.offset[episode] + frame, bank.data))
    stored = data[where]
    if bank.scale is not None:
        return stored.astype(jnp.float32) * bank.scale[where]
    if stored.dtype == jnp.uint8:
        return model.encode(stored)
    return stored.astype(jnp.float32)


def bank_shardings(bank: Bank, mesh: Mesh) -> Bank:
    """Shardings of a bank's arrays: frames over (data, fsdp), the index on every device."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    make: Any = Bank  # filled with shardings instead of arrays
    return make(split, None if bank.scale is None else split, whole, whole, whole)
