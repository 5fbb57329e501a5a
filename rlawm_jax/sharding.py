"""The only module that defines meshes and PartitionSpecs.

A mesh has three axes: `data` (replicas of everything), `fsdp` (parameters and optimizer state split, gathered when
used) and `tensor` (heads and hidden units split). The batch is split over data and fsdp together. Parameters are placed
by the table below: the first pattern found in a leaf's path names the axes of its LAST dimensions; a leading layer axis
is never split. Small leaves, and dimensions not divisible by their mesh axis, stay whole. With several TPU slices only
the `data` axis crosses the network between them.

| leaf | dimensions | split |
|---|---|---|
| query, key, value, up, gate, modulation kernels | [in, out] | in over fsdp, out over tensor (columns) |
| out, down kernels | [in, out] | in over tensor (rows), out over fsdp |
| every other kernel | [..., in, out] | in over fsdp |
| biases, norms, embeddings, statistics, counters | | whole |

Activations keep their rows on the devices that hold the batch's rows (`keep_rows`). Without this constraint the
partitioner sees a batch and a kernel split over the same axis and may gather the batch instead of the kernel.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rlawm_jax.hosts import compiled

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# columns first, rows second: attention and MLP each need one sum over `tensor`, at their end
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"/(query|key|value|up|gate|linear)/kernel", ("fsdp", "tensor")),
    (r"/(out|down)/kernel", ("tensor", "fsdp")),
    (r"kernel", ("fsdp", None)),
)

MIN_SPLIT_SIZE = 2**16  # elements; splitting less costs more in latency than it saves in memory


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them); -1 for `data` or `fsdp` takes what the other axes leave.

    -1 for both means fsdp within a TPU slice and data over slices. Raises ValueError if the product of the sizes is not
    the number of devices, or if they would split a TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if data == fsdp == -1:
        data = max(1, slices)
    if data == -1 and fsdp > 0 and tensor > 0:
        data = len(devices) // (fsdp * tensor)
    elif fsdp == -1 and data > 0 and tensor > 0:
        fsdp = len(devices) // (data * tensor)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != len(devices):
        raise ValueError(
            f"config.mesh: data={data} x fsdp={fsdp} x tensor={tensor} is {data * fsdp * tensor} devices, "
            f"found {len(devices)}; set mesh.data=-1 (or mesh.fsdp=-1) to use what is left"
        )
    # Auto: the compiler chooses shardings inside a program, except those that `keep_rows` fixes
    types = (AxisType.Auto,) * 3
    if slices <= 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=types, devices=devices)
    # fsdp and tensor communicate at every layer, data once per step: only data may cross the network between slices
    if data % slices:
        raise ValueError(
            f"config.mesh.data: expected a multiple of the {slices} slices, found {data}; "
            f"fsdp and tensor stay within a slice"
        )
    grid = create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=types)


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


def place(tree: Any, mesh: Mesh) -> Any:
    """A tree placed on the mesh by the table above; every process passes the same whole arrays, or placed ones."""
    return put(tree, tree_shardings(tree, mesh))


def put(tree: Any, shardings: Any) -> Any:
    """A tree placed leaf by leaf; every process passes the same whole arrays, or placed ones."""

    def put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)  # device_put would communicate, to compare the copies of all processes
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put_leaf, tree, shardings)


def gather(tree: Any) -> Any:
    """A tree that every process can read as a whole; all of them must call this with the same placed tree."""
    if all(getattr(x, "is_fully_addressable", True) or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return tree
    whole = jax.tree.map(lambda leaf: replicated(leaf.sharding.mesh), tree)
    return compiled(jax.jit(lambda tree: tree, out_shardings=whole), tree)(tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding in which every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(i, n): a process (default: this one) feeds the i-th of the n equal parts into which the batch is divided.

    Processes that share rows, because the tensor axis spans them, feed the same part. Raises ValueError if the mesh
    distributes rows unevenly over the processes.
    """
    process = jax.process_index() if process is None else process
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(mine)) for mine in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(set().union(*parts)):
        raise ValueError(
            f"config.mesh: expected processes that hold the same number of batch parts, found {parts}; make "
            f"mesh.tensor a multiple or a divisor of the devices of a process"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this process's part of the batch (`batch_share`)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, to be jitted for `mesh`, with `keep_rows` active inside; on one device, `function` unchanged."""
    if mesh.size == 1:
        return function
    # a mesh that did not come from `make_mesh` is Explicit since jax 0.12: there `keep_rows` would be an assertion
    auto = mesh.abstract_mesh.update(axis_types=(AxisType.Auto,) * len(mesh.abstract_mesh.axis_names))

    @functools.wraps(function)
    def meshed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(auto):
            return function(*args)

    return meshed


def keep_rows(tree: Any, axis: int = 0) -> Any:
    """Activations with their rows (along `axis`) on the devices that hold those of the batch, other axes whole.

    No constraint is added without a mesh (`on_mesh`), or where the rows do not split evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = P(*[None] * axis, BATCH_AXES)

    def keep(x: Array) -> Array:
        return x if x.shape[axis] % parts else jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(keep, tree)


def on_own_heads(function: Callable[..., Array], *arrays: Array) -> Array:
    """function(*arrays) of arrays [b, l, heads, d]: each device computes its own rows and, under `tensor`, own heads.

    For kernels that the partitioner cannot split. Axes that do not split evenly are computed whole by every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    rows, heads = arrays[0].shape[0], arrays[0].shape[2]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = P(None if rows % parts else BATCH_AXES, None, None if heads % mesh.shape["tensor"] else "tensor")
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)


def every_nth_row(tree: Any, n: int) -> Any:
    """Rows 0, n, 2n, ... of arrays [b, ...]; if n divides b, no row leaves its device."""

    def thin(x: Array) -> Array:
        return x[::n] if x.shape[0] % n else x.reshape(-1, n, *x.shape[1:])[:, 0]

    return jax.tree.map(thin, tree)


def micro_batches(batch: Any, parts: int) -> Any:
    """Arrays [b, ...] as [parts, b / parts, ...], part i holding rows i, i + parts, ...: no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise ValueError if the batch does not split evenly into `accumulate` micro-batches over the devices."""
    if accumulate < 1:
        raise ValueError(f"config.train.accumulate: expected at least 1, found {accumulate}")
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulate):
        turns = f" x train.accumulate = {parts * accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"config.data.batch_size: expected a multiple of data x fsdp = {parts} devices{turns}, found {batch_size}"
        )
