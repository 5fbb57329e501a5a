"""Will it fit? Compiles the programs of a config for machines that need not be present, and tabulates their cost.

Programs for TPU topologies are compiled by the real TPU compiler (libtpu), which needs no TPU.
"""

import contextlib
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlawm_jax import markdown
from rlawm_jax.compile_check import cost
from rlawm_jax.compile_check.abstract_programs import PROGRAMS
from rlawm_jax.sharding import make_mesh

LOCAL = "local"
EFFORT = "jax_exec_time_optimization_effort"  # an option of jax, absent from version 0.12 on
# Cloud TPU's names: v5e and v6e count chips, v5p counts cores, two per chip
TOPOLOGIES = {
    "v5e-4": "v5e:2x2",
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-16": "v5p:2x2x2",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
    "v6e-4": "v6e:2x2",
    "v6e-16": "v6e:4x4",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
}
COLUMNS = (
    "machine",
    "backbone",
    "program",
    "mesh",
    "fits",
    "HBM per chip, GiB",
    "of which",
    "TFLOP",
    "collectives",
    "s",
)


@dataclass(frozen=True)
class Fit:
    """The cost of one program on one machine; bytes are per device, FLOPs for all devices together."""

    machine: str
    backbone: str
    program: str
    mesh: str
    arguments: dict[str, int]  # bytes by kind
    memory: cost.Memory | None
    capacity: int | None
    refusal: str  # the compiler's message, if memory did not suffice
    flops: int
    traffic: dict[str, cost.Traffic]
    seconds: float  # to compile

    @property
    def fits(self) -> str:
        """yes, no (with the compiler's reason, if any), or unknown if the memory needed or available is unknown."""
        if self.refusal:
            return f"no: {self.refusal}"
        if self.memory is None or self.capacity is None:
            return "unknown"
        return "yes" if self.memory.total <= self.capacity else "no"

    def cells(self) -> tuple[str, ...]:
        """The row under `COLUMNS`."""
        kinds = self.arguments | ({"temporary": self.memory.temporary} if self.memory else {})
        hbm = f"{self.memory.total / cost.GIB:.2f}" if self.memory else "?"
        of = f" of {self.capacity / cost.GIB:.2f}" if self.capacity else ""
        return (
            self.machine,
            self.backbone,
            self.program,
            self.mesh,
            self.fits,
            hbm + of,
            ", ".join(f"{kind} {size / cost.GIB:.2f}" for kind, size in kinds.items()),
            f"{self.flops / 1e12:.2f}",
            ", ".join(f"{kind} {n} ({size / cost.GIB:.2f} GiB)" for kind, (n, size) in self.traffic.items()) or "none",
            f"{self.seconds:.0f}",
        )


def devices_of(machine: str, slices: int = 1) -> list[Any]:
    """The devices of `local` or of a TPU topology; ValueError says what is missing or misspelt."""
    if machine == LOCAL:
        return jax.devices()
    name = TOPOLOGIES.get(machine, machine)
    if not re.fullmatch(r"v\w+:\d+x\d+(x\d+)?", name):
        raise ValueError(
            f"--topology: expected {LOCAL}, {', '.join(TOPOLOGIES)} or kind:shape such as v5e:4x4, found {machine!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={machine}: expected the TPU compiler (libtpu), found none; "
            f"pip install -r launch/requirements-tpu.txt"
        )
    extra = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices)
    except Exception as error:  # the TPU plugin raises its own exception types
        raise ValueError(f"--topology={machine}: {str(error).splitlines()[0]}") from error


def check_program(name: str) -> None:
    """Raise ValueError if there is no program of that name."""
    if name not in PROGRAMS:
        raise ValueError(f"--program: expected some of {', '.join(PROGRAMS)}, found {name!r}")


def check(config: ConfigDict, machine: str, devices: Sequence[Any], name: str, **recipes: ConfigDict) -> Fit:
    """Compile the program `name` of `config`, and of any further `recipes` that it takes, for `devices`."""
    check_program(name)
    mesh = make_mesh(**config.mesh, devices=devices)
    program = PROGRAMS[name](config, mesh, **recipes)
    begin = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    memory, traffic, refusal = None, {}, ""
    try:
        compiled = traced.lower().compile()
        memory, traffic = cost.memory(compiled), cost.collectives(compiled)
        # arguments that the program does not use (such as a part that is not trained) still occupy memory
        if memory is not None:
            memory = memory._replace(arguments=max(memory.arguments, cost.bytes_per_device(program.arguments)))
    except jax.errors.JaxRuntimeError as error:
        refusal = cost.out_of_memory(error)
    return Fit(
        machine=machine,
        backbone=config.backbone.name,
        program=name,
        mesh=" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device",
        arguments={kind: cost.bytes_per_device(tree) for kind, tree in program.kinds.items()},
        memory=memory,
        capacity=cost.capacity(devices[0]),
        refusal=refusal,
        flops=_flops(config, mesh, name, recipes),
        traffic=traffic,
        seconds=time.perf_counter() - begin,
    )


def _flops(config: ConfigDict, mesh: Mesh, name: str, recipes: dict[str, ConfigDict]) -> int:
    """Of the program with attention as two products: those inside a fused kernel are not in the trace."""
    plain = config.copy_and_resolve_references()
    plain.attention = "xla"
    program = PROGRAMS[name](plain, mesh, **recipes)
    return cost.matmul_flops(program.function.trace(*program.arguments).jaxpr.jaxpr)


class Rows:
    """Rows of a table in a file, one JSON line each, so that an interrupted table can be resumed."""

    def __init__(self, path: Path | None):
        self._path, self._rows = path, {}
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                row = json.loads(line)
                self._rows[row["key"]] = row["cells"]

    def get(self, key: str) -> list[str] | None:
        """The cells stored under `key`, or None."""
        return self._rows.get(key)

    def put(self, key: str, cells: Sequence[str]) -> None:
        """Store a row."""
        self._rows[key] = list(cells)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text("".join(json.dumps({"key": k, "cells": c}) + "\n" for k, c in self._rows.items()))
        new.replace(self._path)


def row_key(machine: str, slices: int, name: str, config: ConfigDict, recipes: dict[str, ConfigDict]) -> str:
    """What a row depends on: machine, program, every setting, versions of the compilers and their effort."""
    versions = {package: _version(package) for package in ("jax", "jaxlib", "libtpu")}
    settings = {recipe: value.to_json_best_effort(sort_keys=True) for recipe, value in recipes.items()}
    effort = getattr(jax.config, EFFORT, None)
    text = json.dumps([versions, effort, settings, config.to_json_best_effort(sort_keys=True)], sort_keys=True)
    return f"{machine} x {slices}, {config.backbone.name}, {name}, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown of rows under `COLUMNS`."""
    return markdown.table(COLUMNS, rows)
