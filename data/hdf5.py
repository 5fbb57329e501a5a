"""Read numbers, and nothing else, from HDF5 files: object arrays, pickles and external links are refused unopened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from data.schema import EpisodeError

MAX_BYTES = 2**28  # per array, except images: a header may claim any size


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """The file, for reading; EpisodeError in one line if it is missing or damaged."""
    if not path.is_file():
        raise EpisodeError(f"{path}: expected an HDF5 file, found none; export the episode again")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise EpisodeError(f"{path}: expected a readable HDF5 file, found: {reason}; export it again") from error


def find(group: h5py.Group, key: str) -> h5py.Dataset | h5py.Group | None:
    """The object at key (a/b/c); None if there is none. EpisodeError if the path leaves the file."""
    node: h5py.Dataset | h5py.Group = group
    for part in key.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _refused(group, key, "a link")
        child = node[part]
        if not isinstance(child, h5py.Dataset | h5py.Group):
            raise _refused(group, key, "a named type")
        node = child
    return node


def dataset(group: h5py.Group, key: str) -> h5py.Dataset | None:
    """The numeric dataset at key, unread; None if there is none. EpisodeError if it holds anything but numbers."""
    node = find(group, key)
    if node is None:
        return None
    if not isinstance(node, h5py.Dataset):
        raise _refused(group, key, "a group (an object array in pieces)")
    if "_pickled" in node.attrs:
        raise _refused(group, key, "a pickled object array")
    if node.dtype.kind not in "biuf":
        raise _refused(group, key, f"dtype {node.dtype}")
    if node.external or node.is_virtual:
        raise _refused(group, key, "data in another file")
    return node


def numbers(group: h5py.Group, key: str) -> np.ndarray | None:
    """The numeric array at key as float32; None if there is none."""
    node = dataset(group, key)
    if node is None:
        return None
    if node.nbytes > MAX_BYTES:
        raise _refused(group, key, f"{node.nbytes / 2**30:.1f} GiB")
    return node[()].astype(np.float32)


def flag(group: h5py.Group, key: str) -> bool | None:
    """The attribute at key as a bool; None if there is none."""
    if key not in group.attrs:
        return None
    value = np.asarray(group.attrs[key])
    if value.size != 1 or value.dtype.kind not in "biuf":
        raise EpisodeError(f"{_where(group, key)}: expected true or false, found {value!s}; export the episode again")
    return bool(value.item())


def text(group: h5py.Group, key: str) -> str:
    """The attribute at key as text; empty if there is none."""
    value = group.attrs.get(key, "")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _where(group: h5py.Group, key: str) -> str:
    return f"{group.file.filename}: {str(group.name).strip('/')}/{key}".replace(": /", ": ")


def _refused(group: h5py.Group, key: str, actual: str) -> EpisodeError:
    return EpisodeError(f"{_where(group, key)}: expected a numeric dataset, found {actual}, not opened; save numbers")
