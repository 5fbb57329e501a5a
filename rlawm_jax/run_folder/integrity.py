"""Decides which checkpoints can be trusted: those whose files have the checksums recorded when they were saved.

The checksums are written last, into `manifest.json`, and compared once before anything in the folder is read.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from rlawm_jax.hosts import exchange
from rlawm_jax.run_folder.logging import announce

MANIFEST = "manifest.json"
CHUNK = 2**24  # bytes read at a time
READERS = 4
DAMAGED = ".damaged"  # what the name of a damaged checkpoint's folder gets

NONE, ALL_DAMAGED = -1, -2  # sent between processes in place of a step


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the message says which, why and what to do."""


class TrustedCheckpoints:
    """The checkpoints of one folder that can be trusted: saved by this process, or equal to their manifest.

    A checkpoint of an older version, which has no manifest, is trusted with a warning.
    """

    def __init__(self, directory: epath.Path, *, read_only: bool):
        self._directory, self._read_only = directory, read_only
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, step: int) -> None:
        """Trust a step without comparing checksums: this process writes it."""
        self._steps.add(step)

    def discard(self, step: int) -> None:
        """No longer trust a step, because writing it failed."""
        self._steps.discard(step)

    def newest(self) -> int | None:
        """The newest step that can be trusted; None if there is no checkpoint.

        Newer damaged ones are reported file by file and, unless read-only, moved aside. Raises CheckpointError if all
        are damaged. All processes must call it together; the first one decides.
        """
        step = exchange(self._decide_newest() if jax.process_index() == 0 else NONE)[0]
        if step == ALL_DAMAGED:
            raise CheckpointError(
                f"{self._directory}: expected an intact checkpoint, found damaged ones only (reported above); restore "
                f"a copy of one, or delete the folder to start from the beginning"
            )
        if step == NONE:
            return None
        self.add(step)
        return step

    def check(self, step: int) -> None:
        """Raise CheckpointError unless the checkpoint of this step can be trusted."""
        if damage := self._damage(step):
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)}: expected the files of its {MANIFEST}, found "
                f"{first_few(damage)}; delete that folder to resume from an older checkpoint "
                f"({committed_steps(self._directory)})"
            )

    def _decide_newest(self) -> int:
        """The newest step that can be trusted, or NONE or ALL_DAMAGED; called on the first process."""
        steps = committed_steps(self._directory)
        for step in reversed(steps):
            folder, damage = self._directory / str(step), self._damage(step)
            if not damage:
                return step
            announce(f"DAMAGED CHECKPOINT {folder}: {first_few(damage)}; falling back to an older one")
            if not self._read_only:
                aside = self._directory / f"{step}{DAMAGED}"
                aside.rmtree(missing_ok=True)
                folder.rename(aside)
                announce(f"moved it to {aside}; delete it once it is no longer needed for inspection")
        return ALL_DAMAGED if steps else NONE

    def _damage(self, step: int) -> list[str]:
        if step in self:
            return []
        folder = self._directory / str(step)
        if not (folder / MANIFEST).exists():
            announce(f"{folder} has no {MANIFEST}: saved by an older version, trusted without checksums")
            damage = []
        else:
            damage = find_damage(folder)
        if not damage:
            self.add(step)
        return damage


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps of all complete checkpoints in a folder, damaged or not, oldest first."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(int(path.name) for path in folders if is_local(path) or (path / MANIFEST).exists())


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
        entries = pool.map(lambda name: _measure(folder / name, flush=True), names)
    text = json.dumps({"files": dict(zip(names, entries, strict=True))}, indent=1)
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


def first_few(problems: list[str]) -> str:
    """The first three problems in one line, and how many more there are."""
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


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
        actual = _measure(folder / name)
    except OSError as error:
        return f"{name} {'missing' if isinstance(error, FileNotFoundError) else f'unreadable ({error.strerror})'}"
    if actual["bytes"] != size:
        return f"{name} has {actual['bytes']} bytes instead of {size}"
    return None if actual["sha256"] == sha256 else f"{name} has different contents"
