"""Reads a pickle as data: nothing that it names is imported or called.

pickletools decodes the opcodes; the machine here builds plain values from them. A class or function remains a `Name`,
and a call of one runs our maker for it, yields a `Placeholder`, or is refused.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Maker = Callable[..., Any]
PLAIN_KEYS = (str, bytes, int, float, type(None))
LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


class PickledObjectsError(ValueError):
    """A pickle holds objects of classes or functions that do not belong to tensors."""


class Placeholder:
    """Stands for an object that is not read."""


class Name(str):
    """`module.name` of a class or function; it is never looked up."""

    __slots__ = ()


def plain_dict(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """A dict with placeholders for unusual keys: hashing a deeply nested tuple overflows the interpreter's stack."""
    return {key if isinstance(key, PLAIN_KEYS) else Placeholder(): value for key, value in items}


def load_pickle(
    file: Any, makers: Mapping[str, Maker], persistent: Maker | None = None, *, placeholders: bool = False
) -> Any:
    """The value of one pickle of a binary file or memory map, which is left at the pickle's end.

    `makers` are called in place of the names they are listed under; `persistent` makes the values of persistent ids.
    Any other name raises PickledObjectsError, or with `placeholders` its objects become placeholders. Sets are returned
    as lists, frozen sets as tuples, and the state of an object is dropped. A damaged pickle may raise any exception.
    """
    machine = _Machine(makers, persistent, placeholders)
    for opcode, argument, _ in pickletools.genops(file):
        step = STEPS.get(opcode.name)
        if step is None:
            raise ValueError(f"opcode {opcode.name} is not used for tensors")
        step(machine, argument)
    return machine.take(1)[0]


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self, makers: Mapping[str, Maker], persistent: Maker | None, placeholders: bool) -> None:
        self.makers, self.persistent, self.placeholders = makers, persistent, placeholders
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> list[Any]:
        """The last `count` values, taken off the stack."""
        if len(self.stack) < count:
            raise ValueError("the pickle pops more values than were pushed")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def marked(self) -> list[Any]:
        """The values since the last mark, taken off the stack."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.take(1)

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Placeholder):
            self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Set the keys and values that alternate in `items`."""
        if isinstance(self.stack[-1], Placeholder):
            return
        self.stack[-1].update(plain_dict(zip(items[::2], items[1::2], strict=True)))

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        qualified = Name(f"{module}.{name}")
        if qualified not in self.makers and not self.placeholders:
            raise PickledObjectsError(f"the pickle names {qualified}")
        return qualified

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Name) and function in self.makers:
            self.stack.append(self.makers[function](*arguments))
        elif self.placeholders:
            self.stack.append(Placeholder())
        else:
            raise PickledObjectsError("the pickle calls one of its objects")

    def look_up(self, identity: Any) -> None:
        if self.persistent is None:
            raise ValueError("an unexpected persistent id")
        self.stack.append(self.persistent(*identity))


def _dict(m: _Machine) -> None:
    items = m.marked()
    m.stack.append({})
    m.update(items)


def _inst(m: _Machine, names: str) -> None:
    arguments = m.marked()
    m.call(m.name(*names.split(" ", 1)), arguments)


def _obj(m: _Machine) -> None:
    function, *arguments = m.marked()
    m.call(function, arguments)


STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(LITERALS, lambda m, value: m.stack.append(value)),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.stack.append([])),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.take(3))),
    **dict.fromkeys(("TUPLE", "FROZENSET"), lambda m, _: m.stack.append(tuple(m.marked()))),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "DICT": lambda m, _: _dict(m),
    "APPEND": lambda m, _: m.extend(m.take(1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.extend(m.marked())),
    "SETITEM": lambda m, _: m.update(m.take(2)),
    "SETITEMS": lambda m, _: m.update(m.marked()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, slot: m.memo.update({slot: m.stack[-1]})),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, slot: m.stack.append(m.memo[slot])),
    "GLOBAL": lambda m, names: m.stack.append(m.name(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack.append(m.name(*m.take(2))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(*m.take(2))),
    "NEWOBJ_EX": lambda m, _: m.call(*m.take(3)[:2]),
    "INST": _inst,
    "OBJ": lambda m, _: _obj(m),
    "BUILD": lambda m, _: m.take(1),
    "BINPERSID": lambda m, _: m.look_up(m.take(1)[0]),
}
