"""Reads files of torch.save without torch: zip archives (since 1.6) and the older format, tensors read on demand.

Both hold a pickle whose tensors refer to storages of raw numbers by persistent ids; pickles.py reads it as data. A file
is mapped, not loaded. In an archive, each member's checksum is verified before it is used; the older format has none.
"""

import io
import mmap
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rlawm_jax.weights.pickles import Maker, Name, PickledObjectsError, Placeholder, load_pickle, plain_dict
from rlawm_jax.weights.rules import ConversionError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first values of the format before 1.6
MAX_DIMENSIONS, MAX_SIZE = 64, 2**48  # of a tensor; more of either is damage
LOCAL_HEADER = 30  # bytes of a zip member before its name; the last four are the lengths of name and extra field

# dtypes that can be read, and bytes per element; in the older format the others' elements have to be counted too
READ = (
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)
SIZES = {dtype: np.dtype(dtype).itemsize for dtype in READ} | {"bfloat16": 2}
OTHER_SIZES = {"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
CLASSES = (
    "Double float64, Float float32, Half float16, BFloat16 bfloat16, Long int64, Int int32, Short int16, Char int8, "
    "Byte uint8, Bool bool, ComplexFloat complex64, ComplexDouble complex128, QInt8 qint8, QUInt8 quint8, "
    "QInt32 qint32, QUInt4x2 quint4x2, QUInt2x4 quint2x4"
)
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in map(str.split, CLASSES.split(","))}
STORAGES["torch.storage.UntypedStorage"] = "uint8"


class OtherFormatError(ValueError):
    """A kind of file that torch.save does not write; the message says which, and what to do."""


class Storage(NamedTuple):
    """Raw numbers of a file: `size` bytes, in the opposite byte order to this machine's if `swapped`."""

    dtype: str
    size: int
    read: Callable[[], np.ndarray]
    swapped: bool = False


class Tensor(NamedTuple):
    """A dense tensor of a file; offset and strides are in elements, as is `extent`, from the first to the last."""

    storage: Storage
    dtype: str
    offset: int
    extent: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The numbers, with bfloat16 widened to float32; ConversionError if the file is damaged."""
        try:
            return self._view()
        except (ValueError, OverflowError) as error:
            raise ConversionError(
                f"expected a dense tensor of numbers, found a damaged one ({error}); fetch the file again"
            ) from None

    def _view(self) -> np.ndarray:
        if len(self.shape) > MAX_DIMENSIONS or max(self.shape, default=0) > MAX_SIZE:
            # asked for these, numpy 2.2 crashes instead of raising
            raise ValueError(f"shape {str(self.shape)[:60]}")
        size = SIZES[self.dtype]
        flat = self.storage.read()[self.offset * size : (self.offset + self.extent) * size].view(f"u{size}")
        if self.storage.swapped:
            flat = flat.byteswap()
        elif not flat.flags.aligned:
            flat = flat.copy()
        # a bfloat16 is the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else flat.view(self.dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [stride * flat.itemsize for stride in self.strides])


class Unreadable(NamedTuple):
    """A tensor that is not dense, or of a dtype that is not read here."""

    kind: str

    def read(self) -> np.ndarray:
        """Raise the ConversionError that says so."""
        raise ConversionError(f"expected a dense tensor of numbers, found {self.kind}")


TENSORS = (Tensor, Unreadable)


def read_torch_file(path: Path, *, placeholders: bool = False) -> Any:
    """The value that torch.save wrote to a file, with tensors as `Tensor` or `Unreadable`, to be read on demand.

    Objects other than tensors and plain values raise PickledObjectsError, or become placeholders with `placeholders`.
    Raises OtherFormatError for other kinds of files and ValueError for a damaged one, in one line without the path.
    """
    with path.open("rb") as file:
        try:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if memory[:2] == b"PK":
                return _read_archive(file, memory, placeholders)
            if memory[257:262] == b"ustar":
                raise OtherFormatError(
                    "a tar archive, as written by PyTorch's first releases; save the plain state_dict again"
                )
            return _read_legacy(memory, placeholders)
        except (PickledObjectsError, OtherFormatError):
            raise
        except Exception as error:  # a damaged file may raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(kind + " ".join(str(error).split())[:200]) from None


def _read_archive(file: BinaryIO, memory: mmap.mmap, placeholders: bool) -> Any:
    if not zipfile.is_zipfile(file):
        raise ValueError("the end of the file is missing")
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    if any(name.split("/")[1:2] in (["code"], ["constants.pkl"]) for name in members):
        raise OtherFormatError("a TorchScript archive, which is a program; save the plain state_dict instead")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise OtherFormatError("a compressed zip archive, which torch.save does not write; unpack it")
    folders = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise OtherFormatError("a zip archive that torch.save did not write; save the plain state_dict instead")
    contents = _Archive(memory, members, folders[0])
    pickle = io.BytesIO(contents.read("data.pkl").data)
    return load_pickle(pickle, MAKERS, contents.storage, placeholders=placeholders)


class _Archive:
    """The members of a zip archive, none of them compressed."""

    def __init__(self, memory: mmap.mmap, members: Mapping[str, zipfile.ZipInfo], folder: str) -> None:
        self.memory, self.members, self.folder = memory, members, folder
        self.verified: set[str] = set()
        if not any(member.CRC for member in members.values()):  # torch.save can leave checksums out
            self.verified.update(members)
        self.swapped = f"{folder}/byteorder" in members and bytes(self.read("byteorder")).decode() != sys.byteorder

    def read(self, name: str) -> np.ndarray:
        """The bytes of a member, as a view of the file; ValueError if they are not those that were written."""
        member = self.members[f"{self.folder}/{name}"]
        end = member.header_offset + LOCAL_HEADER
        lengths = (self.memory[end - 4 : end - 2], self.memory[end - 2 : end])
        start = end + sum(int.from_bytes(length, "little") for length in lengths)
        content = np.frombuffer(self.memory, np.uint8)[start : start + member.file_size]
        if len(content) != member.file_size:
            raise ValueError(f"{member.filename!r} extends beyond the end of the file")
        if member.filename not in self.verified:
            if zlib.crc32(content.data) != member.CRC:
                raise ValueError(f"{member.filename!r} does not match its checksum")
            self.verified.add(member.filename)
        return content

    def storage(self, tag: str, kind: Name, key: str, location: str, count: int) -> Storage:
        """The storage of a persistent id."""
        dtype, size = _described(tag, kind, key, count)
        name = f"data/{key}"
        if size > (actual := self.members[f"{self.folder}/{name}"].file_size):
            raise ValueError(f"{name}: expected {size} bytes, found {actual}")
        return Storage(dtype, size, partial(self.read, name), self.swapped)


def _read_legacy(memory: mmap.mmap, placeholders: bool) -> Any:
    load = partial(load_pickle, memory, MAKERS, placeholders=placeholders)
    if load() != MAGIC:
        raise OtherFormatError("a pickle that torch.save did not write; save the plain state_dict with torch.save")
    if load() != PROTOCOL:
        raise ValueError(f"expected protocol {PROTOCOL}")
    load()  # describes the machine that wrote the file; numbers are little-endian in any case
    storages = _LegacyStorages(memory)
    value = load(storages.storage)
    storages.locate(load())
    return value


class _LegacyStorages:
    """Storages that follow the pickles one after another, each preceded by its number of elements."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.expected: dict[str, tuple[str, int]] = {}  # dtype and bytes by key
        self.starts: dict[str, int] = {}

    def storage(self, tag: str, kind: Name, key: str, location: str, count: int, view: Any) -> Storage:
        """The storage of a persistent id; `view`: None, or (key, first element, elements) of a part of it."""
        dtype, size = _described(tag, kind, key, count)
        if self.expected.setdefault(key, (dtype, size)) != (dtype, size):
            raise ValueError(f"storage {key} is described in two ways")
        first, part = 0, size
        if view is not None:
            first, part = (number * _width(dtype) for number in view[1:])
        if not _counts(first, part) or first + part > size:
            raise ValueError(f"a view extends beyond the end of storage {key}")
        return Storage(dtype, part, partial(self._bytes, key, first, part), sys.byteorder == "big")

    def locate(self, keys: list[str]) -> None:
        """Locate the storages, starting at the current position in the file."""
        for key in keys:
            if not isinstance(key, str):
                raise ValueError("expected the keys of storages")
            dtype, size = self.expected[key]
            count = int.from_bytes(self.memory.read(8), "little")
            self.starts[key] = self.memory.tell()
            if count * _width(dtype) != size or self.starts[key] + size > len(self.memory):
                raise ValueError(f"storage {key}: expected {size} bytes, found {count} elements of {dtype}")
            self.memory.seek(size, 1)
        if absent := self.expected.keys() - self.starts.keys():
            raise ValueError(f"no storage {', '.join(sorted(absent))}")

    def _bytes(self, key: str, first: int, size: int) -> np.ndarray:
        return np.frombuffer(self.memory, np.uint8, size, self.starts[key] + first)


def _width(dtype: str) -> int:
    return SIZES.get(dtype) or OTHER_SIZES[dtype]


def _counts(*numbers: Any) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in numbers)


def _described(tag: Any, kind: Any, key: Any, count: Any) -> tuple[str, int]:
    """Dtype and size in bytes of a persistent id's storage."""
    if tag != "storage" or not isinstance(kind, Name) or kind not in STORAGES:
        raise ValueError("expected the persistent id of a storage, found another")
    if not isinstance(key, str) or not _counts(count):
        raise ValueError("expected a storage's key and number of elements, found others")
    return STORAGES[kind], count * _width(STORAGES[kind])


def _dense(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str = "", bits: Any = None
) -> Tensor | Unreadable:
    """A tensor of `dtype`, by default its storage's; `bits` mark one that is still to be conjugated or negated."""
    dtype = dtype.removeprefix("torch.") or storage.dtype
    if dtype not in SIZES:
        return Unreadable(f"one of {dtype!r:.40}")
    if bits:
        return Unreadable("one that is still to be conjugated or negated")
    # unchecked values stay out of the message: a small pickle can hold values that print very long
    if len(shape) != len(strides) or not _counts(offset, *shape, *strides):
        raise ValueError("expected a tensor's shape, strides and offset, found others")
    extent = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if extent and (offset + extent) * SIZES[dtype] > storage.size:
        raise ValueError(f"a tensor of shape {shape} extends beyond the end of its storage")
    return Tensor(storage, dtype, offset, extent, shape, strides)


def _of_type(maker: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a subclass."""
    if not isinstance(maker, Name):
        raise ValueError("expected the name of what rebuilds a tensor, found none")
    return MAKERS[maker](*arguments)


def _placeholder(*arguments: Any) -> Placeholder:
    return Placeholder()


def _unreadable(kind: str) -> Maker:
    return lambda *arguments: Unreadable(kind)


FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2")
QUANTISERS = tuple(f"per_{per}_{kind}" for per in ("tensor", "channel") for kind in ("affine", "symmetric"))
# what weights-only files may hold besides tensors; the values are not used here
BESIDE = (
    *(f"torch.{name}" for name in (*SIZES, *OTHER_SIZES, *FLOAT8, *QUANTISERS, "complex32", "device", "Tensor")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex")),
    *("torch.serialization._get_layout", "torch.nn.parameter.Parameter", "_codecs.encode", "collections.Counter"),
)
MAKERS: dict[str, Maker] = {
    **dict.fromkeys((*STORAGES, *BESIDE), _placeholder),
    "collections.OrderedDict": plain_dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _dense,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, grad, hooks, bits=None: _dense(
        storage, offset, shape, strides, bits=bits
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, grad, hooks, dtype, bits=None: _dense(
        storage, offset, shape, strides, dtype, bits
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_sparse_tensor": _unreadable("a sparse one"),
    "torch._utils._rebuild_qtensor": _unreadable("a quantised one"),
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested one"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("one without numbers, on the meta device"),
}
