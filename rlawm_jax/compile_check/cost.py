"""The cost of a compiled program: FLOPs from its equations, collectives from its text, memory from the compiler."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GIB = 2**30
# usable HBM of a chip, as the TPU compiler counts it
HBM = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}


class Traffic(NamedTuple):
    """Calls of one kind of collective in a run of the program, and the bytes one device receives from them."""

    calls: int
    bytes: int


class Memory(NamedTuple):
    """Bytes on one device while the program runs; `arguments` stay allocated, `temporary` do not."""

    arguments: int
    outputs: int  # beyond those that reuse an argument's memory
    temporary: int

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return sum(self)


def memory(compiled: jax.stages.Compiled) -> Memory | None:
    """Memory of a compiled program on one device; None if the backend does not report it."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes)


def capacity(device: Any) -> int | None:
    """Bytes of memory of a device, real or only described; None if unknown."""
    if device.platform == "tpu":
        return next((int(size * GIB) for kind, size in HBM.items() if device.device_kind == kind), None)
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def out_of_memory(error: Exception) -> str:
    """The compiler's message if it ran out of memory; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    usage = re.search(r"Used [\d.]+\w of [\d.]+\w \w+", str(error))
    return usage[0].lower() if usage else "out of memory"


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of all matrix products and convolutions on all devices together, a multiply-add counting 2.

    A loop of known length counts as often as it runs (XLA's cost analysis counts it once), a conditional as its most
    expensive branch; recomputation for rematerialisation is included.
    """
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")]
        name = equation.primitive.name
        if name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // shapes[1][features]
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            inner = sum(matmul_flops(sub) for sub in _subprograms(equation.params))
            total += inner * equation.params["length"] if name == "scan" else inner
    return total


def _subprograms(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def collectives(compiled: jax.stages.Compiled) -> dict[str, Traffic]:
    """Collectives by kind in a compiled program, those inside a loop counted as often as it runs."""
    totals: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
    for kind, shapes, times in operations(compiled.as_text() or ""):
        totals[kind][0] += times
        totals[kind][1] += times * sum(size for _, size in shapes)
    return {kind: Traffic(*numbers) for kind, numbers in totals.items() if numbers[0]}


def operations(text: str) -> Iterator[tuple[str, list[tuple[tuple[int, ...], int]], int]]:
    """(kind, [(shape, bytes) of each result], times run) of every collective in an optimised HLO module's text."""
    bodies, entry = _computations(text)
    for name, times in _times_run(bodies, entry).items():
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                results = _shapes(match["type"])
                if match["start"] and match["kind"] != "all-reduce":
                    # an asynchronous start returns (operand, result); a permutation's also has bookkeeping scalars
                    results = [result for result in results if result[0]]
                    results = results[len(results) // 2 :][:1]
                kind = match["kind"]
                # the TPU compiler writes a reduce-scatter as a sum and a slice of it
                if name.startswith("all-reduce-scatter") and (root := _ROOT.search("\n".join(bodies[name]))):
                    kind, results = "reduce-scatter", _shapes(root["type"])
                yield kind, results, times


# one result type, or several in parentheses; TPU layouts contain parentheses too
_TYPE = r"\((?:[^()]|\([^()]*\))*\)|[^\s(]\S*"
_COLLECTIVE = re.compile(rf"= (?P<type>{_TYPE}) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ROOT = re.compile(rf"ROOT \S+ = (?P<type>{_TYPE}) ")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{")
_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _HEADER.match(line)):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            current.append(line)
    return bodies, entry


def _times_run(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length counts once."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            trips = _trips(line, bodies) if " while(" in line else 1
            for match in _CALLEE.finditer(line):
                for callee in (part.strip().lstrip("%") for part in (match[1] or match[2]).split(",")):
                    if callee in bodies:
                        visit(callee, count * trips)

    visit(entry, 1)
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as annotated, or from the one bound in its condition (the TPU compiler annotates none)."""
    if noted := _TRIPS.search(line):
        return int(noted[1])
    called = _CONDITION.search(line)
    condition = "\n".join(bodies.get(called[1], [])) if called else ""
    bounds = _BOUND.findall(condition)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1


def _shapes(text: str) -> list[tuple[tuple[int, ...], int]]:
    shapes = []
    for name, numbers in _SHAPE.findall(text):
        shape = tuple(int(n) for n in numbers.split(",") if n)
        shapes.append((shape, math.prod(shape) * _itemsize(name)))
    return shapes


def _itemsize(name: str) -> int:
    """Bytes of an HLO element type such as f32, bf16, pred, s32, u8, f8e4m3fn."""
    if name == "pred":
        return 1
    if name == "bf16":
        return np.dtype(ml_dtypes.bfloat16).itemsize
    return max(1, int(re.findall(r"\d+", name)[0]) // 8)
