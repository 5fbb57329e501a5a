"""The soak's processes (tests/tools/soak.py): how they run and end, and the contents of their run folders."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 300.0


class SoakError(AssertionError):
    """Something was lost, or did not recover."""


class Child:
    """A process that works in a run folder; `expected` are the ways in which it may end."""

    def __init__(self, folder: Path, work: Callable[[], None], log: Path):
        self.folder, self.log, self.expected = folder, log, {0}
        self.first_step: float | None = None  # when it had finished its first step
        self.status: int | None = None
        self.born = time.monotonic()
        self.log.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            _live(work, log)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def resumed(self) -> int | None:
        """The step it resumed from, 0 for the beginning, None where it has not come so far."""
        text = self.text()
        if "compiled step" not in text and "nothing to train" not in text:
            return None
        match = re.search(r"resuming from (?:step|iteration) (\d+)", text)
        return int(match[1]) if match else 0

    def ended(self) -> bool:
        """Look at it: whether it has ended, and whether it has made a step."""
        if self.first_step is None:
            resumed = self.resumed()
            if resumed is not None and last_step(self.folder) > resumed:
                self.first_step = time.monotonic()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        if not self.ended():
            os.kill(self.pid, number)
        self.expected.add(-number if number == signal.SIGKILL else 128 + number)
        self.wait()

    def wait(self) -> int:
        wait_for(self.ended, f"the end of the process, log:\n{self.text()}")
        if self.status not in self.expected:
            raise SoakError(f"exit status {self.status}, expected {self.expected}:\n{self.text()}")
        return self.status

    def wait_for_step(self, step: int) -> bool:
        """Until metrics of `step` are on disk; False where the process ended before."""
        wait_for(
            lambda: self.ended() or (self.first_step is not None and last_step(self.folder) >= step), f"step {step}"
        )
        return not self.ended()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SoakError(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.004)


def _live(work: Callable[[], None], log: Path) -> None:
    """What a forked process runs; never returns."""
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(work: Callable[[], None], log: Path) -> None:
    """Do something in a separate process, because jax must not start in the one that forks."""
    pid = os.fork()
    if pid == 0:
        _live(work, log)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SoakError(log.read_text())


def last_step(folder: Path) -> int:
    """The last step whose metrics are on disk."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


def committed(folder: Path) -> list[int]:
    """Committed checkpoints, by their names alone."""
    try:
        return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    except OSError:
        return []


def newest_intact(folder: Path) -> int:
    """The newest committed checkpoint that is as it was written; 0 where there is none."""
    from etils import epath

    from rlawm_jax.run_folder.integrity import find_damage

    intact = (s for s in reversed(committed(folder)) if not find_damage(epath.Path(folder / "checkpoints" / str(s))))
    return next(intact, 0)
