"""The loop shared by training, cloning and reinforcement learning: metrics one call late, periodic checkpoints.

However a run ends, starting the same command again resumes from the newest intact checkpoint, bit for bit.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer, CheckpointError
from rlawm_jax.run_folder.goodput import Goodput
from rlawm_jax.run_folder.lock import RunLock
from rlawm_jax.run_folder.logging import MetricLogger, announce, progress
from rlawm_jax.run_folder.signals import Interrupt, interruptible
from rlawm_jax.sharding import shard_batch
from rlawm_jax.training.nonfinite import STOP, SUFFIX, broken_parts, unhalted
from rlawm_jax.training.run import Trainable

MAX_SKIPPED = 50  # non-finite steps in a row after which the run, not a batch, is at fault


class NonFiniteError(FloatingPointError):
    """A value became NaN or infinite; the message says which, where, and what is saved."""


@dataclasses.dataclass
class Pending:
    """A call that has been dispatched but not yet checked, and the data's position before and after it."""

    step: int  # its last step
    metrics: dict[str, jax.Array]
    before: dict[str, Any]
    after: dict[str, Any]


def train(run: Trainable, workdir: Path) -> None:
    """Train from the newest intact checkpoint in `workdir`, or from the start, to the run's last step.

    Raises NonFiniteError after saving the last good state, RunLockError if another process trains in `workdir`,
    CheckpointError if nothing can be saved. SIGTERM and Ctrl-C save and end the process with status 128 + signal.
    """
    with open_run(run, workdir) as checkpoints:
        run_steps(run, checkpoints, workdir)


@contextmanager
def open_run(run: Trainable, workdir: Path) -> Iterator[Checkpointer]:
    """The checkpoints in `workdir`, locked for this process inside the context."""
    config = run.config.train
    with RunLock(workdir):
        checkpoints = Checkpointer(workdir, keep=config.keep_checkpoints, keep_every=config.keep_every)
        with closing(checkpoints):
            yield checkpoints


def run_steps(run: Trainable, checkpoints: Checkpointer, workdir: Path) -> None:
    """Like `train`, in a folder that is already open."""
    start = restore(run, checkpoints)
    if start >= run.steps:
        announce(f"nothing to train: {run.words.unit} {start} of {run.steps} is saved in {checkpoints.directory}")
        return
    checkpoints.check_space((run.state, run.saved_frozen()))
    goodput = Goodput(workdir, start)
    with closing(MetricLogger(workdir, run.config, resumed_from=start)) as logger:
        try:
            Loop(run, checkpoints, logger, goodput).train(start)
        finally:
            announce(goodput.close())


class Loop:
    """The steps of one process."""

    def __init__(self, run: Trainable, checkpoints: Checkpointer, logger: MetricLogger, goodput: Goodput):
        self.run, self.config = run, run.config.train
        self.checkpoints, self.logger, self.goodput = checkpoints, logger, goodput
        self.skipped = self.skipped_in_a_row = 0

    def train(self, start: int) -> None:
        """Every step from `start` to the run's last."""
        run, last, per_call = self.run, self.run.steps, self.run.steps_per_call
        before = run.iterator.get_state()
        batch = shard_batch(next(run.iterator), run.mesh)
        run_step = run.compile_step(batch)
        pending: Pending | None = None
        clock, clock_step = time.perf_counter(), start
        # before this point there is nothing to save, and SIGTERM simply ends the process
        with interruptible() as interrupt, progress(last, start, run.words.title, run.words.unit) as bar:
            for step in range(start + per_call, last + 1, per_call):
                run.state, metrics = run_step(run.state, run.frozen, batch)
                current = Pending(step, metrics, before, after=run.iterator.get_state())
                before = current.after
                if step < last:
                    batch = shard_batch(next(run.iterator), run.mesh)  # read while the device works
                # the device is already working on the next call when the previous one's metrics are fetched
                if pending is not None:
                    self.report(pending, bar)
                pending = current
                self.goodput.step_done(step)
                self.checkpoint_failure()
                stop = interrupt.requested(step // per_call) or self.skipped_in_a_row >= MAX_SKIPPED
                if stop or step == last or step % self.config.checkpoint_every == 0:
                    self.report(pending, bar)
                    self.save(step, pending.after, wait=stop or step == last)
                    pending = None
                if stop:
                    self.stop(step, interrupt)
                if held_out := run.validate(step):
                    self.log(step, held_out)
                if step % run.log_every == 0:
                    now = time.perf_counter()
                    self.log(step, {"time/steps_per_second": (step - clock_step) / (now - clock)})
                    clock, clock_step = now, step

    def report(self, pending: Pending, bar: tqdm) -> None:
        """Fetch a finished call's metrics, handle non-finite ones, and log each step that is due."""
        host = {name: np.asarray(value).ravel() for name, value in jax.device_get(pending.metrics).items()}
        per_call, words = self.run.steps_per_call, self.run.words
        rows = {
            pending.step - per_call + 1 + i: {name: float(values[i]) for name, values in host.items()}
            for i in range(per_call)
        }
        if broken := {step: parts for step, row in rows.items() if (parts := broken_parts(row))}:
            self.nonfinite(pending, *min(broken.items()))
        else:
            self.skipped_in_a_row = 0
        bar.update(per_call)
        for step, row in rows.items():
            if step % self.run.log_every == 0:
                shown = {name: f"{value:.3g}" for name, value in row.items() if name.endswith(words.shown)}
                bar.set_postfix(shown, refresh=False)
                self.log(step, {name: value for name, value in row.items() if not name.endswith(SUFFIX)})

    def nonfinite(self, pending: Pending, step: int, broken: list[str]) -> None:
        """Count a skipped call, or save the state before it and stop, as the config says."""
        words, per_call = self.run.words, self.run.steps_per_call
        what = f"{words.unit} {step}: {words.measured} {', '.join(broken)} is not finite"
        if self.config.on_nonfinite != STOP:
            self.skipped += per_call
            self.skipped_in_a_row += per_call
            whole_call = f"{per_call} {words.unit}s " if per_call > 1 else ""
            announce(f"{what}: {whole_call}skipped ({self.skipped} so far)")
            return
        good = pending.step - per_call
        self.run.state = unhalted(self.run.state)
        saved = f"the state of {words.unit} {good} is saved" if good > 0 else "nothing before it could be saved"
        try:
            if good > 0:
                self.save(good, pending.before, wait=True)
        except CheckpointError as error:
            saved = f"the last good state could not be saved ({error})"
        raise NonFiniteError(
            f"{what}; {saved}; {words.remedy}, or go on without such {words.unit}s (config.train.on_nonfinite=skip)"
        )

    def save(self, step: int, position: dict[str, Any], *, wait: bool) -> None:
        """Begin a checkpoint; without `wait`, a failure does not stop training on a single process."""
        run, checkpoints = self.run, self.checkpoints
        with self.goodput.saving():
            self.checkpoint_failure(block=True)
            try:
                checkpoints.save(step, run.state, run.saved_frozen(), position, run.meta)
                if wait:
                    checkpoints.wait()
            except CheckpointError as error:
                if wait or jax.process_count() > 1:
                    raise
                announce(f"NOT SAVED, training goes on: {error}")

    def checkpoint_failure(self, block: bool = False) -> None:
        """Report a checkpoint that failed in the background; a cluster's processes stop, because they must agree."""
        try:
            if block or self.checkpoints.failed:
                self.checkpoints.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            announce(f"NOT SAVED, training goes on: {error}")

    def stop(self, step: int, interrupt: Interrupt) -> NoReturn:
        """End the process early, after everything has been saved."""
        words = self.run.words
        if interrupt.signal is None:
            raise NonFiniteError(
                f"{words.unit} {step}: {self.skipped_in_a_row} {words.unit}s in a row were not finite and were "
                f"skipped; the state, which they did not change, is saved; {words.remedy}"
            )
        stopped = f"stopped after {words.unit} {step} of {self.run.steps}, which is saved"
        announce(f"{interrupt.signal.name}: {stopped}; start again")
        raise SystemExit(interrupt.exit_status)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics; a full disk loses the line but does not end the run."""
        try:
            self.logger.write(step, metrics)
        except OSError as error:
            announce(f"{self.run.words.unit} {step}: metrics not written: {error}")


def restore(run: Trainable, checkpoints: Checkpointer) -> int:
    """Restore the newest intact checkpoint if there is one; returns the number of finished steps."""
    step = checkpoints.latest_intact()
    if step is None:
        return 0
    saved = checkpoints.meta(step)
    if saved["fingerprint"] != run.meta["fingerprint"]:
        raise ValueError(
            f"checkpoint {checkpoints.directory / str(step)}: expected backbone {saved['fingerprint']} as when saved, "
            f"found {run.meta['fingerprint']}; correct {run.words.backbone} or choose another --workdir"
        )
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        for name, tree in ((STATE, run.state), (FROZEN, run.saved_frozen()))
    }
    arrays = checkpoints.arrays(step, **abstract)
    run.iterator.set_state(checkpoints.data(step))
    run.restored(arrays[STATE], arrays[FROZEN])
    announce(f"resuming from {run.words.unit} {step} in {checkpoints.directory}")
    return step
