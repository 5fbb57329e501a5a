"""Faults against a training process, one after the other, and whether anything was lost.

    python -m tests.tools.soak --faults=200 --seed=0 --table=soak.json

Trains the debug recipe on drawn squares through `launch.train` and learns in the toy world through `launch.train_rl`,
again and again. Every launch is a separate process and meets one fault (soak_faults.py); the next launch has to
recover by itself. The slow parts that are not under test are shared: processes are forked from one that has imported
everything, and take the initial state and the compiled step from the first (soak_jobs.py).
Checked each time: the run resumes from the newest checkpoint that was committed and not damaged; at the end of each
run: everything in its last checkpoint equals that of an undisturbed run, bit for bit. Prints a table;
exits with status 1 at the first failure.

With --table the faults of every finished run are kept in that file, and the same command resumes from there. A failure
is kept as well, and must be looked at and removed before the next start.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.tools.soak_faults import KINDS
from tests.tools.soak_jobs import EVERY, STEPS, TRAINING, digest
from tests.tools.soak_process import Child, SoakError, in_child, last_step, newest_intact

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
DISK_MIB = 64


@dataclass
class Tally:
    """The outcomes of one kind of fault."""

    count: int = 0
    recovered: int = 0
    steps_lost: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, name: str) -> str:
        """Of the table."""
        lost, seconds = self.steps_lost or [0], self.seconds or [0.0]
        return (
            f"| {name} | {self.count} | {self.recovered} | {sum(lost) / len(lost):.1f} ({max(lost)}) | "
            f"{sum(seconds) / len(seconds):.1f} ({max(seconds):.1f}) |"
        )


@dataclass
class Fault:
    """One injected fault: when, and where the run was then."""

    kind: str
    time: float
    step: int  # the last finished step
    committed: int  # the newest committed step that the fault left intact


class Soak:
    """Runs and their faults. `disk` holds the run folders; `limited`: it is a separate small file system."""

    def __init__(self, root: Path, disk: Path, limited: bool, seed: int, table: Path | None = None):
        self.root, self.disk, self.limited, self.file = root, disk, limited, table
        self.tallies = {kind: Tally() for kind in KINDS}
        self.pending: list[Fault] = []
        self.launches = self.runs = 0
        self.job, self.expected = TRAINING, {}  # of the run at hand; digests by a job's module
        self.start_s = 5.0  # seconds to the first step, as last seen
        self.starts: dict[str, list[float]] = {
            "new": [],
            "resumed": [],
        }  # of training, by whether a checkpoint was restored
        self.before_s, self.born = 0.0, time.monotonic()  # of earlier sessions; of this one
        self.recall()
        self.random = random.Random(f"{seed} {self.runs}")

    @property
    def seconds(self) -> float:
        """All sessions together."""
        return self.before_s + time.monotonic() - self.born

    def recall(self) -> None:
        """Resume after the runs that earlier sessions finished."""
        if self.file is None or not self.file.exists():
            return
        kept = json.loads(self.file.read_text())
        if kept["failure"]:
            raise SoakError(f"{self.file} holds a failure; fix its cause and delete the file:\n{kept['failure']}")
        self.tallies |= {kind: Tally(**tally) for kind, tally in kept["tallies"].items()}
        self.starts, self.before_s = kept["starts"], kept["seconds"]
        self.launches, self.runs = kept["launches"], kept["runs"]
        print(f"resuming after {self.injected} faults in {self.runs} runs", flush=True)

    def keep(self, failure: str = "") -> None:
        """Save the results up to the last finished run, or why there will be no further one."""
        if self.file is None:
            return
        kept = {name: getattr(self, name) for name in ("starts", "seconds", "launches", "runs")}
        kept |= {"failure": failure, "tallies": {kind: asdict(tally) for kind, tally in self.tallies.items()}}
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(kept))
        new.replace(self.file)

    def launch(self, folder: Path, inject: Callable[[], None] = lambda: None) -> Child:
        self.launches += 1
        return Child(folder, partial(self.job.run, folder, self.root, inject), self.root / f"{self.launches % 8}.log")

    def digest(self, folder: Path) -> str:
        out = self.root / "digest"
        in_child(lambda: digest(folder, out), self.root / "digest.log")
        return out.read_text()

    def undisturbed(self) -> None:
        """The run of this job that all others are compared with; it leaves them its state and its compiled step."""
        folder = self.disk / "undisturbed"
        self.launch(folder).wait()
        self.expected[self.job.module] = self.digest(folder)
        shutil.rmtree(folder)

    def run(self, faults: int, seconds: float) -> None:
        """Fault after fault, until there were enough or time is up; every run that was begun is finished."""
        deadline = time.monotonic() + seconds
        while self.injected < faults and time.monotonic() < deadline:
            self.job = KINDS[self.random.choice(self.due())].job
            if self.job.module not in self.expected:
                self.undisturbed()
            folder, finished = self.disk / f"run{self.runs}", False
            while not finished:
                enough = self.injected >= faults or time.monotonic() > deadline
                child = self.launch(folder) if enough else self.disturbed(folder)
                finished = child.wait() == 0
                self.settle(child)
            if self.digest(folder) != self.expected[self.job.module]:
                raise SoakError(f"run {self.runs}: final state differs from the undisturbed run's")
            shutil.rmtree(folder)
            self.runs += 1
            self.keep()
            print(
                f"{self.injected} faults in {self.runs} runs, all equal to the undisturbed one, "
                f"{self.seconds / 60:.1f} min",
                flush=True,
            )

    @property
    def injected(self) -> int:
        return sum(tally.count for tally in self.tallies.values())

    def due(self) -> list[str]:
        """The kinds of faults that came least often."""
        least = min(self.tallies[kind].count for kind in KINDS)
        return [kind for kind in KINDS if self.tallies[kind].count == least]

    def disturbed(self, folder: Path) -> Child:
        """A process that meets a fault that is due, unless none of this job's is or the run is nearly over."""
        kinds = [kind for kind in self.due() if KINDS[kind].job is self.job]
        target = max(last_step(folder), 2 * EVERY) + self.random.randint(1, 14)
        if not kinds or target > STEPS - 6:
            return self.launch(folder)
        kind = self.random.choice(kinds)
        return KINDS[kind].meet(self, kind, folder, target)

    def hit(self, kind: str, folder: Path, when: float) -> Fault:
        """Note a fault, after the process is dead: the next process can resume only from what is on the disk now."""
        fault = Fault(kind, when, last_step(folder), newest_intact(folder))
        self.tallies[kind].count += 1
        self.pending.append(fault)
        return fault

    def settle(self, child: Child) -> None:
        """The faults before this process are overcome if it resumed from the right step and made another one."""
        resumed = child.resumed()
        if resumed is None or child.first_step is None:
            return
        self.start_s = child.first_step - child.born
        if self.job is TRAINING:
            self.starts["resumed" if resumed else "new"].append(self.start_s)
        overcome = [fault for fault in self.pending if fault.time < child.first_step]
        if overcome and resumed < overcome[-1].committed:
            raise SoakError(f"resumed from {resumed}, but {overcome[-1].committed} was committed:\n{child.text()}")
        for fault in overcome:
            self.overcome(fault.kind, max(0, fault.step - resumed), child.first_step - fault.time)
        self.pending = self.pending[len(overcome) :]

    def overcome(self, kind: str, steps_lost: int, seconds: float) -> None:
        tally = self.tallies[kind]
        tally.recovered += 1
        tally.steps_lost.append(steps_lost)
        tally.seconds.append(seconds)

    def table(self) -> str:
        lines = ["| fault | count | recovered | steps lost, mean (most) | seconds to recover, mean (most) |"]
        lines += ["|---|---|---|---|---|"]
        every = Tally()
        for kind, tally in self.tallies.items():
            lines.append(tally.row(kind))
            every.count, every.recovered = every.count + tally.count, every.recovered + tally.recovered
            every.steps_lost += tally.steps_lost
            every.seconds += tally.seconds
        return "\n".join([*lines, every.row("all")])


@contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """A file system of DISK_MIB at `path`; False where this user may not make one."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(path)]
    mounted = (
        shutil.which("mount") and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="how many to inject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="begin no further run after this time")
    parser.add_argument("--table", type=Path, help="file to keep the faults of finished runs in, and to resume from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlawm_jax-soak-") as folder:
        root = Path(folder)
        os.environ.update(ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")})
        # what takes seconds in every process, once; jax itself starts in the processes alone
        from launch import cli  # noqa: F401  (each launcher defines the same flags)
        from rlawm_jax.rl import loop  # noqa: F401
        from rlawm_jax.training import setup  # noqa: F401
        from tests.rl import toy_run  # noqa: F401
        from tests.tiny_run import write_dataset

        in_child(lambda: write_dataset(root), root / "data.log")
        with small_disk(root / "disk") as limited:
            soak = Soak(root, root / "disk", limited, options.seed, options.table)
            if soak.injected < options.faults:
                try:
                    soak.run(options.faults, 60 * options.minutes)
                except SoakError as error:
                    soak.keep(failure=str(error))
                    raise
        print(soak.table())
        cold, resumed = (statistics.median(soak.starts[kind] or [0.0]) for kind in ("new", "resumed"))
        print(
            f"\nmedian time from the start of a process that trains to its first step: {cold:.2f} s new, "
            f"{resumed:.2f} s resumed"
        )
        where = (
            f"a disk of {DISK_MIB} MiB"
            if limited
            else "files limited in size, because no separate disk could be mounted"
        )
        print(
            f"\n{soak.injected} faults (seed {options.seed}, {where}), {soak.launches} processes, {soak.runs} runs of "
            f"{STEPS} steps, each equal to the undisturbed run bit for bit; a checkpoint every {EVERY} steps; "
            f"{soak.seconds / 60:.1f} min"
        )


if __name__ == "__main__":
    try:
        main()
    except SoakError as error:
        sys.exit(f"FAILED: {error}")
