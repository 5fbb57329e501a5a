"""The soak's faults (tests/tools/soak.py): each takes a run folder and returns the process that met it."""

import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.tools.soak_jobs import LEARNING, TRAINING, Job
from tests.tools.soak_process import Child, SoakError, committed, last_step, wait_for

if TYPE_CHECKING:
    from tests.tools.soak import Soak

Meet = Callable[["Soak", str, Path, int], Child]


class Kind(NamedTuple):
    """A kind of fault, and what it happens to."""

    job: Job
    meet: Meet


# ---- inside the process ----


def kill_at_file_operation(phase: str, count: int, delay: float) -> None:
    """SIGKILL at the count-th file operation after a `phase` (".saving", ".deleting") has begun, or shortly after."""
    seen = {"in": False, "operations": 0}

    def hook(event: str, args: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"):
            return
        name = str(args[0]) if args else ""
        if phase in name and (phase != ".deleting" or event == "shutil.rmtree"):
            seen["in"] = True
        if seen["in"]:
            seen["operations"] += 1
            if seen["operations"] == count:
                if delay:
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def slow_disk(seconds: float) -> None:
    """Every file operation on checkpoints takes longer."""

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and args and "/checkpoints/" in str(args[0]):
            time.sleep(seconds)

    sys.addaudithook(hook)


def no_space_check() -> None:
    """The disk is full when writing, but not when checked before."""
    from rlawm_jax.run_folder.checkpoint import Checkpointer

    Checkpointer.check_space = lambda *_: None


# ---- from outside ----


def killed_anywhere(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """At a random moment since the start of the process, or of a step."""
    child = soak.launch(folder)
    if soak.random.random() < 0.5:
        child.wait_for_step(target)
        delay = soak.random.uniform(0, 0.2)
    else:
        delay = soak.random.uniform(0, soak.start_s + 1)
    moment = time.monotonic() + delay
    wait_for(lambda: child.ended() or time.monotonic() >= moment, "a moment")
    return _kill(soak, kind, child)


def killed_in_phase(phase: str) -> Meet:
    """At a random file operation of a save or a deletion."""

    def fault(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
        count, delay = soak.random.randint(1, 40), soak.random.choice([0.0, soak.random.uniform(0, 0.05)])
        child = soak.launch(folder, lambda: kill_at_file_operation(phase, count, delay))
        child.expected.add(-signal.SIGKILL)
        if child.wait() != 0:
            soak.hit(kind, folder, time.monotonic())
        return child

    return fault


def terminated(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """SIGTERM: the current step must be saved."""
    child = soak.launch(folder)
    child.wait_for_step(target)
    when = time.monotonic()
    child.kill(signal.SIGTERM)
    if child.status:
        met = soak.hit(kind, folder, when)
        if met.committed != met.step:
            raise SoakError(f"SIGTERM at step {met.step}, saved {met.committed}:\n{child.text()}")
    return child


def damaged(damage: Callable[[Path, random.Random], None]) -> Meet:
    """A file of the newest checkpoint is damaged; the run must fall back to the one before."""

    def fault(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
        child = soak.launch(folder)
        child.wait_for_step(target)
        when = time.monotonic()
        child.kill()
        steps = committed(folder)
        if child.status and len(steps) >= 2:
            newest = folder / "checkpoints" / str(steps[-1])
            damage(
                soak.random.choice(sorted(p for p in newest.rglob("*") if p.stat().st_size and p.is_file())),
                soak.random,
            )
            soak.hit(kind, folder, when)
        return child

    return fault


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def full_disk(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """No space for a while: training continues, and saves again when there is some."""
    unchecked = soak.random.random() < 0.5
    child = soak.launch(folder, no_space_check if unchecked else lambda: None)
    if not child.wait_for_step(target):
        return child
    child.expected.add(1)  # where its last checkpoint did not fit
    before = len(re.findall("NOT SAVED", child.text()))
    with soak_full(soak, child):
        wait_for(lambda: child.ended() or child.text().count("NOT SAVED") > before, "a save that fails")
    when, newest = time.monotonic(), max(committed(folder), default=0)
    if child.ended():
        if child.status:
            soak.hit(kind, folder, when)
        return child
    soak.tallies[kind].count += 1
    wait_for(lambda: child.ended() or max(committed(folder), default=0) > newest, "a save after the disk was full")
    soak.overcome(kind, 0, time.monotonic() - when)
    child.kill(signal.SIGTERM)
    return child


@contextmanager
def soak_full(soak: "Soak", child: Child) -> Iterator[None]:
    """The disk is full, or, if it must not be filled, files of this process may not grow."""
    filler = soak.disk / "filler"
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if soak.limited:
        free = shutil.disk_usage(soak.disk).free
        with filler.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, free - soak.random.randrange(200_000)))
    else:
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)
        if not soak.limited and not child.ended():
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)


def not_a_number(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """A call that meets NaN: the run stops with the state before it saved."""
    job = soak.job
    good = (target - 1) // job.per_call * job.per_call
    child = soak.launch(folder, lambda: job.poison(target))
    child.expected.add(1)
    if child.wait():
        if job.not_finite.format(good + 1) not in child.text():
            raise SoakError(child.text())
        met = soak.hit(kind, folder, time.monotonic())
        if met.committed != good:
            raise SoakError(f"NaN in step {target}, saved {met.committed}:\n{child.text()}")
    return child


def two_jobs(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """A second process in the same folder is refused in one line, and the first continues."""
    child = soak.launch(folder)
    if not child.wait_for_step(target):
        return child
    begin, second = time.monotonic(), soak.launch(folder)
    second.expected = {1, 0}
    refused, seconds = second.wait() == 1, time.monotonic() - begin
    if child.ended():  # it was over before the second one looked
        return child
    lines = [line for line in second.text().splitlines() if line.startswith("error: ")]
    if not refused or len(lines) != 1 or "no other process trains in" not in lines[0] or str(child.pid) not in lines[0]:
        raise SoakError(second.text())
    soak.tallies[kind].count += 1
    child.wait_for_step(last_step(folder) + 1)
    soak.overcome(kind, 0, seconds)
    child.kill(signal.SIGTERM)
    return child


def slow_and_killed(soak: "Soak", kind: str, folder: Path, target: int) -> Child:
    """Saving takes far longer than the steps between two checkpoints."""
    seconds = soak.random.uniform(0.002, 0.02)
    child = soak.launch(folder, lambda: slow_disk(seconds))
    child.wait_for_step(target)
    return _kill(soak, kind, child)


def _kill(soak: "Soak", kind: str, child: Child) -> Child:
    when = time.monotonic()
    child.kill()
    if child.status:
        soak.hit(kind, child.folder, when)
    return child


KINDS = {
    "kill -9 at any moment": Kind(TRAINING, killed_anywhere),
    "kill -9 in a save": Kind(TRAINING, killed_in_phase(".saving")),
    "kill -9 in a deletion": Kind(TRAINING, killed_in_phase(".deleting")),
    "SIGTERM": Kind(TRAINING, terminated),
    "newest checkpoint truncated": Kind(TRAINING, damaged(truncate)),
    "newest checkpoint with a flipped bit": Kind(TRAINING, damaged(flip_bit)),
    "full disk": Kind(TRAINING, full_disk),
    "NaN in a step": Kind(TRAINING, not_a_number),
    "second job in the folder": Kind(TRAINING, two_jobs),
    "slow disk, kill -9": Kind(TRAINING, slow_and_killed),
    "RL: kill -9 at any moment": Kind(LEARNING, killed_anywhere),
    "RL: SIGTERM": Kind(LEARNING, terminated),
    "RL: full disk": Kind(LEARNING, full_disk),
    "RL: NaN in an iteration": Kind(LEARNING, not_a_number),
    "RL: second job in the folder": Kind(LEARNING, two_jobs),
}
