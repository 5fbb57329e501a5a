"""Faults against a training process, one after the other, and whether anything was lost.

    python -m tests.tools.soak --faults=200 --seed=0 --table=soak.json

Trains the debug recipe on painted squares through `launch.train`, again and again. Every launch is a real process of
its own and meets one fault; the next launch has to recover by itself. What would take most of a process's time and is
not under test is shared: processes are forked from one that has imported everything, and take the initial state and
the compiled step from the first. Checked each time: training goes on from the newest checkpoint that was committed and
not damaged; at the end of each run: parameters, moments and data position equal those of a run that was never
disturbed, bit for bit. Prints a table; exits with status 1 at the first thing that is not as it should be.

With --table the faults of every finished run are kept in that file, and the same command goes on from there. A failure
is kept as well, and nothing goes on until somebody has looked at it.
"""

import argparse
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
STEPS, EVERY = 100, 4
RECIPE = {
    "train.steps": STEPS,
    "train.checkpoint_every": EVERY,
    "train.keep_every": 40,
    "objectives.image_decoder.enabled": False,
    "objectives.denoiser.start_step": 0,
    "optimizer.name": "adamw",  # a smaller program than Muon's
    "logging.tensorboard": False,
}
DISK_MIB = 64
PATIENCE_S = 300.0


class SoakError(AssertionError):
    """Something was lost, or did not recover."""


@dataclass
class Tally:
    """What became of one kind of fault."""

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


class Child:
    """A training process; `expected` are the ways in which it may end."""

    def __init__(self, folder: Path, arguments: list[str], inject: Callable[[], None], log: Path):
        self.folder, self.log, self.expected = folder, log, {0}
        self.first_step: float | None = None  # when it had finished its first step
        self.status: int | None = None
        self.born = time.monotonic()
        self.log.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            _run(lambda: _train([f"--workdir={folder}", *arguments], inject), log)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def resumed(self) -> int | None:
        """The step it resumed from, 0 for the beginning, None where it has not come so far."""
        text = self.text()
        if "compiled step" not in text and "nothing to train" not in text:
            return None
        found = re.search(r"resuming from step (\d+)", text)
        return int(found[1]) if found else 0

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


def _run(work: Callable[[], None], log: Path) -> None:
    """The life of a forked process; never returns."""
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


def _train(arguments: list[str], inject: Callable[[], None]) -> None:
    from launch import cli, train

    prepared = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "prepared"
    (recall if prepared.exists() else remember)(prepared)
    inject()
    sys.argv = ["launch.train", "--config=configs/pusht.py:debug", *arguments]
    cli.run(train.main)


def remember(file: Path) -> None:
    """Keep what the first process prepares and compiles."""
    import jax
    import numpy as np
    from jax.experimental.serialize_executable import serialize

    from rlawm_jax.training import loop

    compile_step = loop._compile

    def compile_and_keep(run, batch):
        arrays = jax.tree.map(np.asarray, (run.state, run.frozen))
        compiled = compile_step(run, batch)
        results = compiled.out_tree.unflatten([0] * compiled.out_tree.num_leaves)
        file.write_bytes(pickle.dumps((*arrays, run.meta, serialize(compiled)[0], results[1])))
        return compiled

    loop._compile = compile_and_keep


def recall(file: Path) -> None:
    """Take the first process's initial state and compiled step: to trace them again takes most of a process's time.

    Everything else is the real thing: data, lock, restoring, the loop, saving, signals.
    """
    from data.pipeline import TrainIterator, WindowBatches, WindowLoader
    from rlawm_jax.training import loop, setup

    *arrays, meta, program, metrics = pickle.loads(file.read_bytes())

    def prepare(config, workdir):
        mesh = setup.make_mesh(**config.mesh)
        batches = WindowBatches(WindowLoader(config.data, fingerprint=meta["fingerprint"]), "train")
        state, frozen = (setup.place(tree, mesh) for tree in arrays)
        return setup.Run(config, mesh, TrainIterator(batches, "train"), state, frozen, None, meta)

    def load(run, batch):
        import jax
        from jax.experimental.serialize_executable import deserialize_and_load

        arguments, results = ((run.state, run.frozen, batch), {}), (run.state, metrics)
        loop.say("compiled step: taken from the first process")
        return deserialize_and_load(program, jax.tree.structure(arguments), jax.tree.structure(results))

    setup.prepare, loop._compile = prepare, load


def in_child(work: Callable[[], None], log: Path) -> None:
    """Do something in a process of its own, for jax must not start in the one that forks."""
    pid = os.fork()
    if pid == 0:
        _run(work, log)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SoakError(log.read_text())


# ---- what a run left ----


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

    from rlawm_jax.run_folder.checksums import find_damage

    found = (s for s in reversed(committed(folder)) if not find_damage(epath.Path(folder / "checkpoints" / str(s))))
    return next(found, 0)


def digest(folder: Path, out: Path) -> None:
    """Write down a hash over everything the last checkpoint restores to."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer

    checkpoints = Checkpointer(folder, read_only=True)
    sha = hashlib.sha256()
    sha.update(json.dumps(checkpoints.data(STEPS), sort_keys=True).encode())
    for item in (STATE, FROZEN):
        tree = ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(STEPS) / item)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            array = np.asarray(leaf)
            sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    out.write_text(sha.hexdigest())


# ---- faults inside the process ----


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


def poison(step: int) -> None:
    """The actions of one step's batch are not numbers."""
    from data.pipeline import TrainIterator

    original = TrainIterator.__next__

    def poisoned(self):
        batch = original(self)
        if self.get_state()["batches"] == step:
            batch["actions"] = batch["actions"] * float("nan")
        return batch

    TrainIterator.__next__ = poisoned


def no_space_check() -> None:
    """The disk is found full while writing and not before."""
    from rlawm_jax.run_folder.checkpoint import Checkpointer

    Checkpointer.check_space = lambda *_: None


# ---- the soak ----


class Soak:
    """Runs under fire. `disk` is where they live; `limited` says that it is a small file system of its own."""

    def __init__(self, root: Path, disk: Path, limited: bool, seed: int, table: Path | None = None):
        self.root, self.disk, self.limited, self.file = root, disk, limited, table
        self.arguments = [f"--config.{name}={value}" for name, value in RECIPE.items()]
        self.arguments += [f"--config.data.root={root}", f"--config.data.token_root={root / 'tokens'}"]
        self.tallies = {kind: Tally() for kind in KINDS}
        self.pending: list[Fault] = []
        self.launches = self.runs = 0
        self.expected, self.start_s = "", 5.0  # seconds to the first step, as last seen
        self.starts: dict[str, list[float]] = {"new": [], "resumed": []}  # by whether a checkpoint was restored
        self.before_s, self.born = 0.0, time.monotonic()  # of earlier sessions; of this one
        self.recall()
        self.random = random.Random(f"{seed} {self.runs}")

    @property
    def seconds(self) -> float:
        """All sessions together."""
        return self.before_s + time.monotonic() - self.born

    def recall(self) -> None:
        """Go on from the runs that earlier sessions finished."""
        if self.file is None or not self.file.exists():
            return
        kept = json.loads(self.file.read_text())
        if kept["failure"]:
            raise SoakError(f"{self.file} holds a failure; mend it and delete the file:\n{kept['failure']}")
        self.tallies |= {kind: Tally(**tally) for kind, tally in kept["tallies"].items()}
        self.starts, self.before_s = kept["starts"], kept["seconds"]
        self.launches, self.runs = kept["launches"], kept["runs"]
        print(f"going on after {self.injected} faults in {self.runs} runs", flush=True)

    def keep(self, failure: str = "") -> None:
        """Write down what was found up to the last finished run, or why there will be no further one."""
        if self.file is None:
            return
        kept = {name: getattr(self, name) for name in ("starts", "seconds", "launches", "runs")}
        kept |= {"failure": failure, "tallies": {kind: asdict(tally) for kind, tally in self.tallies.items()}}
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(kept))
        new.replace(self.file)

    def launch(self, folder: Path, inject: Callable[[], None] = lambda: None) -> Child:
        self.launches += 1
        return Child(folder, self.arguments, inject, self.root / f"{self.launches % 8}.log")

    def digest(self, folder: Path) -> str:
        out = self.root / "digest"
        in_child(lambda: digest(folder, out), self.root / "digest.log")
        return out.read_text()

    def undisturbed(self) -> None:
        """The run that all others are compared with; it fills the cache of compiled programs."""
        folder = self.disk / "undisturbed"
        self.launch(folder).wait()
        self.expected = self.digest(folder)
        shutil.rmtree(folder)

    def run(self, faults: int, seconds: float) -> None:
        """Fault after fault, until there were enough or time is up; every run that was begun is finished."""
        deadline = time.monotonic() + seconds
        while self.injected < faults and time.monotonic() < deadline:
            folder, finished = self.disk / f"run{self.runs}", False
            while not finished:
                enough = self.injected >= faults or time.monotonic() > deadline
                child = self.launch(folder) if enough else self.disturbed(folder)
                finished = child.wait() == 0
                self.settle(child)
            if self.digest(folder) != self.expected:
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

    def disturbed(self, folder: Path) -> Child:
        """A process that meets the kind of fault that is due, unless the run is nearly over."""
        kind = min(KINDS, key=lambda kind: (self.tallies[kind].count, self.random.random()))
        target = max(last_step(folder), 2 * EVERY) + self.random.randint(1, 14)
        return self.launch(folder) if target > STEPS - 6 else KINDS[kind](self, kind, folder, target)

    def hit(self, kind: str, folder: Path, when: float) -> Fault:
        """Note a fault, after the process is dead: what is on the disk now is what there is to go on from."""
        fault = Fault(kind, when, last_step(folder), newest_intact(folder))
        self.tallies[kind].count += 1
        self.pending.append(fault)
        return fault

    def settle(self, child: Child) -> None:
        """The faults before this process are overcome if it went on from where it had to, and made a step."""
        resumed = child.resumed()
        if resumed is None or child.first_step is None:
            return
        self.start_s = child.first_step - child.born
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


# ---- the faults: each returns the process that met it ----


def killed_anywhere(soak: Soak, kind: str, folder: Path, target: int) -> Child:
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


def killed_in_phase(phase: str) -> Callable[[Soak, str, Path, int], Child]:
    """At a random file operation of a save or a deletion."""

    def fault(soak: Soak, kind: str, folder: Path, target: int) -> Child:
        count, delay = soak.random.randint(1, 40), soak.random.choice([0.0, soak.random.uniform(0, 0.05)])
        child = soak.launch(folder, lambda: kill_at_file_operation(phase, count, delay))
        child.expected.add(-signal.SIGKILL)
        if child.wait() != 0:
            soak.hit(kind, folder, time.monotonic())
        return child

    return fault


def terminated(soak: Soak, kind: str, folder: Path, target: int) -> Child:
    """SIGTERM: the step at hand must be saved."""
    child = soak.launch(folder)
    child.wait_for_step(target)
    when = time.monotonic()
    child.kill(signal.SIGTERM)
    if child.status:
        fault = soak.hit(kind, folder, when)
        if fault.committed != fault.step:
            raise SoakError(f"SIGTERM at step {fault.step}, saved {fault.committed}:\n{child.text()}")
    return child


def damaged(damage: Callable[[Path, random.Random], None]) -> Callable[[Soak, str, Path, int], Child]:
    """A file of the newest checkpoint is not what was written; the one before must do."""

    def fault(soak: Soak, kind: str, folder: Path, target: int) -> Child:
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


def full_disk(soak: Soak, kind: str, folder: Path, target: int) -> Child:
    """No space for a while: training goes on, and saves again when there is some."""
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
def soak_full(soak: Soak, child: Child) -> Iterator[None]:
    """The disk is full, or where it is not ours to fill, files of this process may not grow."""
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


def not_a_number(soak: Soak, kind: str, folder: Path, target: int) -> Child:
    """A batch with NaN: the run stops with the step before it saved."""
    child = soak.launch(folder, lambda: poison(target))
    child.expected.add(1)
    if child.wait():
        if f"step {target}: loss or gradient of" not in child.text():
            raise SoakError(child.text())
        fault = soak.hit(kind, folder, time.monotonic())
        if fault.committed != target - 1:
            raise SoakError(f"NaN in step {target}, saved {fault.committed}:\n{child.text()}")
    return child


def two_jobs(soak: Soak, kind: str, folder: Path, target: int) -> Child:
    """A second process in the same folder is refused in one line, and the first goes on."""
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


def slow_and_killed(soak: Soak, kind: str, folder: Path, target: int) -> Child:
    """Saving takes far longer than the steps between two checkpoints."""
    seconds = soak.random.uniform(0.002, 0.02)
    child = soak.launch(folder, lambda: slow_disk(seconds))
    child.wait_for_step(target)
    return _kill(soak, kind, child)


def _kill(soak: Soak, kind: str, child: Child) -> Child:
    when = time.monotonic()
    child.kill()
    if child.status:
        soak.hit(kind, child.folder, when)
    return child


KINDS: dict[str, Callable[[Soak, str, Path, int], Child]] = {
    "kill -9 at any moment": killed_anywhere,
    "kill -9 in a save": killed_in_phase(".saving"),
    "kill -9 in a deletion": killed_in_phase(".deleting"),
    "SIGTERM": terminated,
    "newest checkpoint truncated": damaged(truncate),
    "newest checkpoint with a flipped bit": damaged(flip_bit),
    "full disk": full_disk,
    "NaN in a step": not_a_number,
    "second job in the folder": two_jobs,
    "slow disk, kill -9": slow_and_killed,
}


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
    parser.add_argument("--table", type=Path, help="file to keep the faults of finished runs in, and to go on from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlawm_jax-soak-") as folder:
        root = Path(folder)
        os.environ.update(ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")})
        # what takes seconds in every process, once; jax itself starts in the processes alone
        from launch import train  # noqa: F401
        from rlawm_jax.training import loop, setup  # noqa: F401
        from tests.tiny_run import write_dataset

        in_child(lambda: write_dataset(root), root / "data.log")
        with small_disk(root / "disk") as limited:
            soak = Soak(root, root / "disk", limited, options.seed, options.table)
            if soak.injected < options.faults:
                soak.undisturbed()
                try:
                    soak.run(options.faults, 60 * options.minutes)
                except SoakError as error:
                    soak.keep(failure=str(error))
                    raise
        print(soak.table())
        cold, resumed = (statistics.median(soak.starts[kind] or [0.0]) for kind in ("new", "resumed"))
        print(f"\nmedian time from a process's start to its first step: {cold:.2f} s new, {resumed:.2f} s resumed")
        where = f"a disk of {DISK_MIB} MiB" if limited else "files limited in size for want of a disk of our own"
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
