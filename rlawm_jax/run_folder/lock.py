"""One writer per run folder: a lock that names its owner, does not outlive a crash, and works across hosts.

The owner holds a kernel lock on `workdir/run.lock`, which is released however its process ends, and writes a heartbeat
into the file every few seconds. Where the kernel lock cannot tell (another host's job on a file system that does not
share locks), the heartbeat decides: an owner that writes none for a while is dead.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from rlawm_jax.hosts import on_first_process
from rlawm_jax.run_folder.logging import announce

LOCK_FILE = "run.lock"
BEAT_S = 5.0
PATIENCE_S = 20.0  # four missed beats
LENGTH = 512  # bytes of the lock file


class RunLockError(ValueError):
    """Another process trains in this run folder; the message says which, since when, and what to do."""


class RunLock:
    """Held while training: `with RunLock(workdir): ...`. Raises RunLockError if a live process holds it.

    The first process of a job holds it for all. A dead owner's lock is taken over.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / LOCK_FILE
        self._file: Any = None  # descriptor, while held
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._keep_beating, daemon=True, name="run_lock")
        now = time.time()
        self._record: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "beat": 0}

    def __enter__(self) -> "RunLock":
        # the others wait, so that no process enters the folder before it is locked
        on_first_process(self._hold)
        return self

    def _hold(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        self._beat()
        self._beating.start()

    def __exit__(self, *exception: object) -> None:
        if self._file is None:
            return
        self._stop.set()
        self._beating.join()
        os.ftruncate(self._file, 0)  # an empty file means free; unlinking would race with processes that have it open
        os.close(self._file)
        self._file = None

    def _take(self) -> None:
        owner = _read(self._path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shared = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunLockError(self._refusal(owner)) from error
            shared = False  # a file system without locks
        if not owner:
            return
        if shared and owner.get("host") == self._record["host"]:
            announce(f"{self._path}: taking over from process {owner.get('pid')}, which ended without releasing it")
            return
        self._wait_for_death(owner)

    def _wait_for_death(self, owner: dict[str, Any]) -> None:
        """Wait for a heartbeat of the owner, without comparing clocks; raises RunLockError if there is one."""
        announce(f"{self._path}: held by {_describe(owner)}; checking for {PATIENCE_S:g} s whether it is alive")
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(min(0.2, PATIENCE_S / 4))
            if _read(self._path) != owner:
                raise RunLockError(self._refusal(owner))
        announce(f"{self._path}: no heartbeat: taking over")

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"{self._path}: expected a run folder that no other process trains in, found {_describe(owner)}; wait for "
            f"it, stop it, or choose another --workdir"
        )

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        self._record["beat"] += 1
        text = json.dumps(self._record).ljust(LENGTH - 1) + "\n"  # fixed length, so that every read finds it complete
        with contextlib.suppress(OSError):  # on a full disk the kernel lock has to suffice
            os.pwrite(self._file, text.encode(), 0)


def _read(path: Path) -> dict[str, Any]:
    """The owner named in the lock file; empty if there is none or it cannot be read."""
    try:
        record = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    minutes = (time.time() - owner.get("since", time.time())) / 60
    return f"process {owner.get('pid')} on {owner.get('host')}, holding it for {minutes:.0f} min"
