"""The conversion engine: one table of rules per dialect of names, complete on both sides and run in both directions.

A rule ties a name in the checkpoint to one or more *slots* of our parameters. Names and slots are templates over the
same placeholders, so a table is read forwards (checkpoint to parameters) and backwards (parameters to state_dict):

    Rule("encoder.layer.{i}.mlp.fc1.weight", ("stack.blocks.mlp.up.kernel[{i}]",), TRANSPOSE)

A slot is a dotted parameter path, optionally with an index on the leading axis: our layers are stacked, so `[{i}]` puts
layer i of the checkpoint into slice i of the leaf. A tensor that feeds several slots (fused q, k, v) names all of them.

The slots of the target determine exactly which tensors a checkpoint must hold; everything else in it has to be ignored
by name, with a reason. Tensors are read, checked and written one at a time, so even the largest model needs memory for
its parameters once plus one tensor.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Read = Callable[[], np.ndarray]  # raises ConversionError, without names, unless it is a dense tensor of numbers
Source = Mapping[str, Read]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Module = TypeVar("Module", bound=nnx.Module)


ALIGNMENT = 64  # bytes


class ConversionError(ValueError):
    """A checkpoint does not fit its target; the message names every offender."""


@contextmanager
def collected() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Collect the ConversionErrors of the `with problem():` blocks inside, and raise them as one at the end."""
    errors: list[str] = []

    @contextmanager
    def problem() -> Iterator[None]:
        try:
            yield
        except ConversionError as error:
            errors.append(str(error))

    yield problem
    if errors:
        raise ConversionError("\n".join(errors))


class Transform(NamedTuple):
    """How one checkpoint tensor is turned into the values of its slots, and how they are turned back into it."""

    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    backward: Callable[..., np.ndarray]


SAME = Transform(lambda x: (x,), lambda x: x)
TRANSPOSE = Transform(lambda x: (x.T,), lambda x: x.T)  # torch linears are [out, in], ours [in, out]


def split(parts: int, *, transpose: bool = False) -> Transform:
    """Equal parts along the first axis, one per slot; `transpose` for the fused kernel of several linears."""

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.T if transpose else part for part in np.split(x, parts))

    def backward(*slots: np.ndarray) -> np.ndarray:
        return np.concatenate([slot.T if transpose else slot for slot in slots])

    return Transform(forward, backward)


class Rule(NamedTuple):
    """One kind of checkpoint tensor and the slots it fills."""

    source: str
    targets: tuple[str, ...]
    transform: Transform = SAME


def linear(source: str, target: str, index: str = "", *, bias: bool = True) -> list[Rule]:
    """Rules of one torch Linear: `source`.weight and .bias into `target`.kernel and .bias."""
    rules = [Rule(f"{source}.weight", (f"{target}.kernel{index}",), TRANSPOSE)]
    return [*rules, Rule(f"{source}.bias", (f"{target}.bias{index}",))] if bias else rules


def norm(source: str, target: str, index: str = "") -> list[Rule]:
    """Rules of one torch LayerNorm or GroupNorm: .weight and .bias into .scale and .bias."""
    return [
        Rule(f"{source}.weight", (f"{target}.scale{index}",)),
        Rule(f"{source}.bias", (f"{target}.bias{index}",)),
    ]


@dataclass(frozen=True)
class Table:
    """All rules of one dialect.

    ignored: name template -> why we need nothing from such a tensor.
    optional: parameter path -> why a checkpoint may lack it; it is then zero.
    constants: tensors written when the table runs backwards, so that a strict load finds every name it expects.
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    def recognises(self, name: str) -> bool:
        """Whether a tensor of this name belongs to the dialect."""
        return any(_pattern(rule.source).fullmatch(name) for rule in self.rules) or self.ignores(name)

    def ignores(self, name: str) -> bool:
        return any(_pattern(template).fullmatch(name) for template in self.ignored)


class _Slot(NamedTuple):
    path: str
    row: int | None

    def of(self, leaves: Mapping[str, Any]) -> Any:
        # the ellipsis keeps a view even where the leaf has no further axis
        return leaves[self.path][...] if self.row is None else leaves[self.path][self.row, ...]


class _Entry(NamedTuple):
    rule: Rule
    slots: tuple[_Slot, ...]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression: every {placeholder} is one dot-free piece of the name."""
    pieces, seen = [], set()
    for piece in re.split(r"(\{\w+\})", template):
        key = piece[1:-1]
        if not re.fullmatch(r"\{\w+\}", piece):
            pieces.append(re.escape(piece))
        elif key in seen:
            pieces.append(f"(?P={key})")
        else:
            seen.add(key)
            pieces.append(f"(?P<{key}>[^.]+)")
    return re.compile("".join(pieces))


def _slot(text: str) -> _Slot:
    path, _, index = text.removesuffix("]").partition("[")
    return _Slot(path, int(index) if index else None)


def _captures(target: str, shapes: Shapes) -> Iterator[dict[str, str]]:
    """All values of the placeholders for which the target's leaf exists."""
    path, _, index = target.removesuffix("]").partition("[")
    for leaf, shape in shapes.items():
        match = _pattern(path).fullmatch(leaf)
        if match and index.startswith("{"):
            yield from ({**match.groupdict(), index[1:-1]: str(i)} for i in range(shape.shape[0]))
        elif match:
            yield match.groupdict()


def enumerate_tensors(table: Table, shapes: Shapes) -> dict[str, _Entry]:
    """Every tensor that a checkpoint of this dialect holds for such a target, in table order.

    Raises ValueError if the table itself leaves a leaf unfilled or fills one twice.
    """
    entries: dict[str, _Entry] = {}
    owner: dict[_Slot, str] = {}
    for rule in table.rules:
        for captures in _captures(rule.targets[0], shapes):
            name = rule.source.format(**captures)
            slots = tuple(_slot(target.format(**captures)) for target in rule.targets)
            for slot in slots:
                if slot in owner or name in entries:
                    raise ValueError(f"table {table.name}: {name} and {owner.get(slot, name)} both fill {slot.path}")
                owner[slot] = name
            entries[name] = _Entry(rule, slots)
    for path, shape in shapes.items():
        rows = {slot.row for slot in owner if slot.path == path}
        if rows != {None} and rows != set(range(shape.shape[0] if shape.shape else 0)):
            raise ValueError(f"table {table.name}: no rule fills {path}")
    return entries


def choose_table(tables: list[Table], source: Source, label: str) -> Table:
    """The dialect that recognises the most tensor names; ConversionError if none recognises any."""
    score = {table.name: sum(map(table.recognises, source)) for table in tables}
    best = max(tables, key=lambda table: score[table.name])
    if not score[best.name]:
        names = ", ".join(list(source)[:5]) or "none at all"
        raise ConversionError(
            f"{label}: expected tensors under one of the name styles {', '.join(score)}, found {names}, ...; "
            "the checkpoint is of another model"
        )
    return best


def convert(source: Source, table: Table, shapes: Shapes, label: str) -> dict[str, np.ndarray]:
    """Convert checkpoint tensors to our parameters.

    `shapes` holds the target's leaves by dotted path; `label` names checkpoint and target in the message. Values are
    widened to the leaf's dtype and never narrowed. Raises ConversionError with one line per missing, unexpected,
    misshapen, wrongly typed or non-finite tensor; runs of layer indices are written as {0-11}.
    """
    entries = enumerate_tensors(table, shapes)
    leaves = {path: _empty(shape) for path, shape in shapes.items()}
    problems = [
        (name, "unexpected: the target has no such parameter")
        for name in source
        if name not in entries and not table.ignores(name)
    ]
    for name, (rule, slots) in entries.items():
        if name in source:
            problems += [(name, detail) for detail in _place(source[name], rule, slots, leaves)]
        elif all(slot.path in table.optional for slot in slots):
            for slot in slots:
                slot.of(leaves)[...] = 0
        else:
            problems.append((name, "missing"))
    if problems:
        lines = "\n".join(f"  {line}" for line in _grouped(problems))
        raise ConversionError(f"{label}: {len(problems)} tensors do not fit ({table.name} names):\n{lines}")
    return leaves


def _empty(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Aligned memory that jax adopts without a copy: on a CPU, device_put copies arrays that are not aligned."""
    size = int(np.prod(shape.shape)) * shape.dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(shape.dtype).reshape(shape.shape)


def _place(read: Read, rule: Rule, slots: tuple[_Slot, ...], leaves: dict[str, np.ndarray]) -> list[str]:
    """Write one tensor into its slots; returns what is wrong with it, if anything."""
    try:
        tensor = read()
    except ConversionError as error:
        return [str(error)]
    views = [slot.of(leaves) for slot in slots]
    # the expected shape is the one that our empty slots give when the rule runs backwards
    expected = rule.transform.backward(*views).shape
    if tensor.shape != expected:
        return [f"expected shape {expected}, found {tensor.shape}"]
    dtype = views[0].dtype
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or np.promote_types(tensor.dtype, dtype) != dtype:
        return [f"expected {dtype} or a narrower float, found {tensor.dtype}"]
    parts = rule.transform.forward(tensor.astype(dtype, copy=False))
    if not all(np.isfinite(part).all() for part in parts):
        return ["holds NaN or infinity"]
    for view, part in zip(views, parts, strict=True):
        view[...] = part
    return []


def revert(leaves: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters as the (name, tensor) pairs of a state_dict, one tensor in memory at a time."""
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, (rule, slots) in enumerate_tensors(table, shapes).items():
        yield name, np.asarray(rule.transform.backward(*(np.asarray(slot.of(leaves)) for slot in slots)), order="C")
    yield from table.constants.items()


def _grouped(problems: list[tuple[str, str]]) -> list[str]:
    """One line per kind of problem, with runs of the first number in a name folded into {a-b}."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, detail in problems:
        number = re.search(r"(?<![^.])\d+(?=\.)", name)
        if number is None:
            groups[name, "", detail] = []
        else:
            groups.setdefault((name[: number.start()], name[number.end() :], detail), []).append(int(number[0]))
    lines = []
    for (head, tail, detail), numbers in groups.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        folded = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        middle = f"{{{folded}}}" if len(numbers) > 1 else folded
        lines.append(f"{head}{middle}{tail}: {detail}")
    return lines


def flat_parameters(module: nnx.Module) -> dict[str, Any]:
    """The module's parameters (or their shapes, for an abstract module) by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def with_parameters(module: Module, leaves: dict[str, np.ndarray]) -> Module:
    """A copy of an abstract module that holds `leaves`; the dict is emptied so that nothing is in memory twice."""
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(jax.device_put(leaves.pop(".".join(map(str, path)))))) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
