"""Where the wall time of a run went, over all its restarts: `workdir/goodput.json`, and a line at the end.

Goodput is the time of steps that are part of the result divided by all time since the run was first started, including
time in which nothing ran.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

FILE = "goodput.json"
WRITE_EVERY_S = 1.0
PARTS = {
    "steps": "steps that count",
    "redone": "steps done again",
    "checkpoints": "waiting for checkpoints",
    "start": "starting",
    "stopped": "not running",
}


class Goodput:
    """Accounts for time since the start of this process, added to the record of earlier ones.

    Call `step_done` after every call of the step, wrap waiting for a checkpoint in `saving`, and `close` at the end.
    """

    def __init__(self, workdir: Path, resumed_from: int, clock: Any = time.time):
        self._path, self._clock = workdir / FILE, clock
        self._last = self._started = _process_start() if clock is time.time else clock()
        self._stepping = False
        self._written = 0.0
        self._record = _read(self._path) or _fresh(self._started)
        self._first_step = self._record["step"] is None
        if not self._first_step:
            self._account_for_restart(resumed_from)
        self._record["step"] = resumed_from

    def _account_for_restart(self, resumed_from: int) -> None:
        record, seconds = self._record, self._record["seconds"]
        lost = max(0, record["step"] - resumed_from)
        steps = max(record["session_steps"], 1)
        again = min(lost / steps, 1.0) * record["session_seconds"]
        seconds["steps"] -= again
        seconds["redone"] += again
        seconds["stopped"] += max(0.0, self._started - record["alive"])
        record["restarts"] += 1
        record["steps_redone"] += lost
        record["session_steps"], record["session_seconds"] = 0, 0.0

    def step_done(self, step: int) -> None:
        """Record that all steps up to this one are dispatched, and those of the previous call finished."""
        elapsed = self._lap()
        record = self._record
        if self._stepping:
            record["seconds"]["steps"] += elapsed
            record["session_seconds"] += elapsed
        else:  # all time up to the first step counts as starting
            record["seconds"]["start"] += elapsed
            if not self._first_step:
                record["recoveries"].append(round(self._last - self._started, 2))
            self._stepping = True
        record["session_steps"] += step - record["step"]
        record["step"] = step
        if self._last - self._written >= WRITE_EVERY_S:
            self._write()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time inside as waiting for a checkpoint."""
        record, name = self._record, "steps" if self._stepping else "start"
        record["seconds"][name] += self._lap()
        try:
            yield
        finally:
            record["seconds"]["checkpoints"] += self._lap()
            self._write()

    def close(self) -> str:
        """Write the record; returns a one-line summary."""
        record = self._record
        seconds = record["seconds"]
        seconds["steps" if self._stepping else "start"] += self._lap()
        self._write()
        total = sum(seconds.values())
        parts = ", ".join(f"{text} {seconds[name]:.1f} s" for name, text in PARTS.items())
        line = f"goodput {100 * seconds['steps'] / max(total, 1e-9):.1f} % of {total:.1f} s ({parts})"
        if record["restarts"]:
            line += f"; {record['restarts']} restarts, {record['steps_redone']} steps done again"
        if times := record["recoveries"]:
            line += f", {sum(times) / len(times):.1f} s from a restart to its first step (longest {max(times):.1f} s)"
        return line

    def _lap(self) -> float:
        now = self._clock()
        elapsed, self._last = max(0.0, now - self._last), now
        return elapsed

    def _write(self) -> None:
        if jax.process_index() != 0:
            return
        self._written = self._record["alive"] = self._last
        new = self._path.with_suffix(".json.new")
        with contextlib.suppress(OSError):  # a full disk must not end the run over this record
            new.write_text(json.dumps(self._record))
            new.replace(self._path)


def _fresh(now: float) -> dict[str, Any]:
    return {
        "step": None,  # the last step recorded
        "alive": now,  # when it was recorded, seconds since 1970
        "restarts": 0,
        "steps_redone": 0,
        "recoveries": [],  # for each restart, seconds from the process's start to its first step
        "session_steps": 0,
        "session_seconds": 0.0,
        "seconds": dict.fromkeys(PARTS, 0.0),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """The record of earlier processes; None if it is missing or damaged, and accounting starts afresh."""
    try:
        record = json.loads(path.read_text())
        fresh = _fresh(0.0)
        fits = record.keys() == fresh.keys() and record["seconds"].keys() == fresh["seconds"].keys()
    except (OSError, ValueError, AttributeError, KeyError):
        return None
    return record if fits else None


def _process_start() -> float:
    """When this process began, in seconds since 1970; now, where the system does not say (not Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
