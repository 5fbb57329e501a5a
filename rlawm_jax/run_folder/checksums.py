"""Checksums of a folder's files: written last, compared before anything in the folder is trusted."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

MANIFEST = "manifest.json"
CHUNK = 2**24  # bytes read at a time
READERS = 4


def is_local(path: epath.PathLike) -> bool:
    """Whether a path lies in a file system, where a rename is atomic, and not in an object store."""
    return "://" not in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; an object store's address is unchanged."""
    return epath.Path(os.path.abspath(path)) if is_local(path) else epath.Path(path)  # noqa: PTH100 (epath lacks it)


def write_manifest(folder: epath.Path) -> None:
    """Flush every file of `folder` to disk and record its size and SHA-256; the manifest is written last."""
    names = sorted(_files(folder))
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda name: _measure(folder / name, flush=True), names)
    text = json.dumps({"files": dict(zip(names, found, strict=True))}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")
    flush_to_disk(folder / MANIFEST)


def find_damage(folder: epath.Path) -> list[str]:
    """Differences from the manifest, one phrase per file; empty if there are none."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text())["files"]
        checks = [(name, entry["bytes"], entry["sha256"]) for name, entry in wanted.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} unreadable ({type(error).__name__})"]
    with ThreadPoolExecutor(READERS) as pool:
        return [problem for problem in pool.map(lambda check: _compare(folder, *check), checks) if problem]


def flush_to_disk(path: epath.Path) -> None:
    """Flush a file, or a folder's entries, to disk; object stores do so themselves."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, f"{name}/")
        elif name != MANIFEST:
            yield name


def _measure(path: epath.Path, *, flush: bool = False) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if flush:
        flush_to_disk(path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _compare(folder: epath.Path, name: str, size: int, sha256: str) -> str | None:
    try:
        found = _measure(folder / name)
    except OSError as error:
        return f"{name} {'missing' if isinstance(error, FileNotFoundError) else f'unreadable ({error.strerror})'}"
    if found["bytes"] != size:
        return f"{name} has {found['bytes']} bytes instead of {size}"
    return None if found["sha256"] == sha256 else f"{name} has other contents"
