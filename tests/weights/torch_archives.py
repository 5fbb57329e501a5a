"""Files as torch.save writes them, assembled by hand: opcodes of the pickle, archives, the format before 1.6."""

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlawm_jax.weights.rules import ConversionError
from rlawm_jax.weights.sources import open_source

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Opcodes(bytes):
    """Opcodes that leave one value on the stack."""


@dataclass
class Named:
    """A class or function by `module.name`."""

    name: str


@dataclass
class Call:
    """What a function returns for arguments."""

    name: str
    arguments: tuple


@dataclass
class Id:
    """A persistent id."""

    value: Any


def opcodes(value: Any) -> bytes:
    """The opcodes of protocol 2 that make a value."""
    match value:
        case Opcodes():
            return value
        case Named():
            module, _, name = value.name.rpartition(".")
            return f"c{module}\n{name}\n".encode()
        case Call():
            return opcodes(Named(value.name)) + opcodes(value.arguments) + b"R"
        case Id():
            return opcodes(value.value) + b"Q"
        case dict():
            return b"}(" + b"".join(opcodes(item) for pair in value.items() for item in pair) + b"u"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
    return pickle.dumps(value, protocol=2)[2:-1]  # plain values: without PROTO and STOP


def dump(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def storage(key: str, dtype: str, count: int, *view: Any) -> Id:
    return Id(("storage", Named(f"torch.{STORAGES[dtype]}"), key, "cpu", count, *view))


def tensor(kept: Id, shape: tuple, strides: tuple, offset: int = 0, *more: Any) -> Call:
    hooks = Call("collections.OrderedDict", ())
    return Call("torch._utils._rebuild_tensor_v2", (kept, offset, shape, strides, False, hooks, *more))


def archive(path: Path, value: Any, storages: dict[str, bytes], **more: bytes) -> Path:
    """A zip archive of torch.save; `more` members by name."""
    members = {"data.pkl": dump(value)} | more | {f"data/{key}": numbers for key, numbers in storages.items()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in ({"byteorder": b"little"} | members | {"version": b"3\n"}).items():
            file.writestr(f"{path.stem}/{name}", content)
    return path


def legacy(path: Path, value: Any, storages: dict[str, np.ndarray]) -> Path:
    """The format before 1.6."""
    out = io.BytesIO()
    for part in (MAGIC, 1001, {"little_endian": True}, value, list(storages)):
        out.write(dump(part))
    for numbers in storages.values():
        out.write(struct.pack("<q", numbers.size) + numbers.tobytes())
    path.write_bytes(out.getvalue())
    return path


NUMBERS = np.arange(6, dtype=np.float32)
VECTOR = tensor(storage("0", "float32", 6), (6,), (1,))
STATE = {"a": VECTOR}


def refused(path: Path, reader=open_source, **options) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConversionError) as error:
        for read in reader(path, **options).values():
            read()
    assert "\n" not in str(error.value)
    return str(error.value)
