"""The only home of meshes and PartitionSpecs.

A mesh has three axes: `data` (replicas of everything), `fsdp` (parameters and optimizer state split, gathered when
used) and `tensor` (heads and hidden units split). The batch is split over data and fsdp together. Parameters are placed
by the table below: the first pattern found in a leaf's path names the axes of its LAST dimensions; a leading layer axis
is never split. Small leaves, and dimensions that a mesh axis does not divide, stay whole.

| leaf | dimensions | split |
|---|---|---|
| query, key, value, up, gate, modulation kernels | [in, out] | in over fsdp, out over tensor (columns) |
| out, down kernels | [in, out] | in over tensor (rows), out over fsdp |
| every other kernel | [..., in, out] | in over fsdp |
| biases, norms, embeddings, statistics, counters | | whole |
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(query|key|value|up|gate|linear)/kernel", ("fsdp", "tensor")),
    (r"/(out|down)/kernel", ("tensor", "fsdp")),
    (r"kernel", ("fsdp", None)),
)

MIN_SPLIT_SIZE = 2**16  # elements; splitting less costs more in latency than it saves in memory


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them); -1 for `data` takes whatever the other axes leave.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and fsdp > 0 and tensor > 0:
        data = len(devices) // (fsdp * tensor)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise ValueError(
            f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} is {data * fsdp * tensor} devices, "
            f"found {len(devices)}; set mesh.data=-1 to use what is left"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_name(path: tuple) -> str:
    """A leaf's path as text, `rla/encoder/blocks/...`, the same for parameters and for their optimizer moments."""
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """How the leaf called `name` is split over `mesh`."""
    if math.prod(shape) < MIN_SPLIT_SIZE:
        return P()
    axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
    if len(shape) < len(axes):
        return P()
    padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return P(*(a if a and size % mesh.shape[a] == 0 else None for a, size in zip(padded, shape, strict=True)))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays or shapes, leaf by leaf, from the table above."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, leaf_spec(path_name(path), leaf.shape, mesh)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's slice of the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError where the batch does not split evenly."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"config.data.batch_size: expected a multiple of data x fsdp = {parts} devices, found {batch_size}"
        )
