"""The one training loop: batches in, steps out, metrics one step late, checkpoints on the way.

Whatever ends it, starting the same command again goes on from the newest intact checkpoint, bit for bit.
"""

import dataclasses
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from rlawm_jax.hosts import compiled
from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer, CheckpointError
from rlawm_jax.run_folder.goodput import Goodput
from rlawm_jax.run_folder.lock import RunLock
from rlawm_jax.run_folder.logging import MetricLogger, progress, say
from rlawm_jax.run_folder.signals import Interrupt, interruptible
from rlawm_jax.sharding import shard_batch
from rlawm_jax.training.nonfinite import STOP, broken_parts, guarded, unhalted
from rlawm_jax.training.setup import Run
from rlawm_jax.training.state import count_parameters
from rlawm_jax.training.step import Metrics, jit_train_step

MAX_SKIPPED = 50  # non-finite steps in a row: not a bad batch but a bad run
REMEDY = "lower config.optimizer.learning_rate or set config.optimizer.clip"


class NonFiniteError(FloatingPointError):
    """A loss or gradient stopped being a number; the message says where and what is saved."""


@dataclasses.dataclass
class Pending:
    """A step that has been dispatched and not looked at yet, and the data's position before and after it."""

    step: int
    metrics: Metrics
    before: dict[str, Any]
    after: dict[str, Any]


def train(run: Run, workdir: Path) -> None:
    """Train from the newest intact checkpoint in `workdir`, or from the start, to config.train.steps.

    Raises NonFiniteError after saving the last good state, RunLockError where another process trains in `workdir`,
    CheckpointError where nothing can be saved. SIGTERM and Ctrl-C save and end the process with status 128 + signal.
    """
    config = run.config.train
    with RunLock(workdir):
        checkpoints = Checkpointer(workdir, keep=config.keep_checkpoints, keep_every=config.keep_every)
        with closing(checkpoints):
            start = restore(run, checkpoints)
            if start >= config.steps:
                say(f"nothing to train: step {start} of {config.steps} is saved in {checkpoints.directory}")
                return
            checkpoints.check_space((run.state, run.saved_frozen()))
            goodput = Goodput(workdir, start)
            with closing(MetricLogger(workdir, run.config, resumed_from=start)) as logger:
                try:
                    Loop(run, checkpoints, logger, goodput).train(start)
                finally:
                    say(goodput.close())


class Loop:
    """The steps of one training process."""

    def __init__(self, run: Run, checkpoints: Checkpointer, logger: MetricLogger, goodput: Goodput):
        self.run, self.config = run, run.config.train
        self.checkpoints, self.logger, self.goodput = checkpoints, logger, goodput
        self.skipped = self.skipped_in_a_row = 0

    def train(self, start: int) -> None:
        """Every step from `start` to config.train.steps."""
        run, last = self.run, self.config.steps
        before = run.iterator.get_state()
        batch = shard_batch(next(run.iterator), run.mesh)
        run_step = _compile(run, batch)
        pending: Pending | None = None
        clock, clock_step = time.perf_counter(), start
        # up to here there was nothing to save, and SIGTERM simply ended the process
        with interruptible() as interrupt, progress(last, start, "train") as bar:
            for step in range(start + 1, last + 1):
                run.state, metrics = run_step(run.state, run.frozen, batch)
                current = Pending(step, metrics, before, after=run.iterator.get_state())
                before = current.after
                if step < last:
                    batch = shard_batch(next(run.iterator), run.mesh)  # read while the device works
                # the device is already at the next step when the previous one's metrics are fetched
                if pending is not None:
                    self.report(pending, bar)
                pending = current
                self.goodput.step_done(step)
                self.checkpoint_failure()
                stop = interrupt.requested(step) or self.skipped_in_a_row >= MAX_SKIPPED
                if stop or step == last or step % self.config.checkpoint_every == 0:
                    self.report(pending, bar)
                    self.save(step, pending.after, wait=stop or step == last)
                    pending = None
                if stop:
                    self.stop(step, interrupt)
                if step % self.config.log_every == 0:
                    now = time.perf_counter()
                    self.log(step, {"time/steps_per_second": (step - clock_step) / (now - clock)})
                    clock, clock_step = now, step

    def report(self, pending: Pending, bar: tqdm) -> None:
        """Fetch a finished step's metrics, deal with a non-finite one, log on time."""
        host = {name: float(np.asarray(value)) for name, value in jax.device_get(pending.metrics).items()}
        if broken := broken_parts(host):
            self.nonfinite(pending, broken)
        else:
            self.skipped_in_a_row = 0
        bar.update(1)
        if pending.step % self.config.log_every == 0:
            bar.set_postfix({k: f"{v:.3g}" for k, v in host.items() if k.endswith("/loss")}, refresh=False)
            self.log(pending.step, {k: v for k, v in host.items() if not k.endswith("/finite")})

    def nonfinite(self, pending: Pending, broken: list[str]) -> None:
        """Count a step that changed nothing, or save the state before it and stop, as the config says."""
        what = f"step {pending.step}: loss or gradient of {', '.join(broken)} is not finite"
        if self.config.on_nonfinite != STOP:
            self.skipped += 1
            self.skipped_in_a_row += 1
            say(f"{what}: skipped ({self.skipped} so far)")
            return
        good = pending.step - 1
        self.run.state = unhalted(self.run.state)
        saved = f"the state of step {good} is saved"
        try:
            if good > 0:
                self.save(good, pending.before, wait=True)
        except CheckpointError as error:
            saved = f"the last good state could not be saved ({error})"
        raise NonFiniteError(f"{what}; {saved}; {REMEDY}, or go on without such steps (config.train.on_nonfinite=skip)")

    def save(self, step: int, position: dict[str, Any], *, wait: bool) -> None:
        """Begin a checkpoint; without `wait`, one that fails does not stop the training."""
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
                say(f"NOT SAVED, training goes on: {error}")

    def checkpoint_failure(self, block: bool = False) -> None:
        """Tell of a checkpoint that failed in the background; processes of a cluster stop, for they must agree."""
        try:
            if block or self.checkpoints.failed:
                self.checkpoints.wait()
        except CheckpointError as error:
            if jax.process_count() > 1:
                raise
            say(f"NOT SAVED, training goes on: {error}")

    def stop(self, step: int, interrupt: Interrupt) -> NoReturn:
        """End the process early; everything is saved."""
        if interrupt.signal is None:
            raise NonFiniteError(
                f"step {step}: {self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite and "
                f"were skipped; the state, which they did not change, is saved; {REMEDY}"
            )
        say(f"{interrupt.signal.name}: stopped after step {step} of {self.config.steps}, which is saved; start again")
        raise SystemExit(interrupt.exit_status)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics down; a full disk costs the line and not the run."""
        try:
            self.logger.write(step, metrics)
        except OSError as error:
            say(f"step {step}: metrics not written: {error}")


def restore(run: Run, checkpoints: Checkpointer) -> int:
    """Continue from the newest intact checkpoint where there is one; returns the number of finished steps."""
    step = checkpoints.latest_intact()
    if step is None:
        return 0
    saved = checkpoints.meta(step)
    if saved["fingerprint"] != run.meta["fingerprint"]:
        raise ValueError(
            f"checkpoint {checkpoints.directory / str(step)}: expected backbone {saved['fingerprint']} as when saved, "
            f"found {run.meta['fingerprint']}; correct config.backbone or choose another --workdir"
        )
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        for name, tree in ((STATE, run.state), (FROZEN, run.saved_frozen()))
    }
    arrays = checkpoints.arrays(step, **abstract)
    run.iterator.set_state(checkpoints.data(step))
    run.state = arrays[STATE]
    for name, value in arrays[FROZEN].items():
        run.frozen[name] = value
    say(f"resuming from step {step} in {checkpoints.directory}")
    return step


def _compile(run: Run, batch: dict[str, jax.Array]):
    """The step compiled for this batch; prints parameters, memory and FLOPs before anything runs."""
    step = guarded(run.step_fn, run.config.train.on_nonfinite)
    jitted = jit_train_step(step, run.state, run.frozen, run.mesh, list(batch))
    program = compiled(jitted, run.state, run.frozen, batch)
    table = ", ".join(f"{part} {count_parameters(p) / 1e6:.2f}M" for part, p in run.state.params.items())
    say(f"trained parameters: {table}; frozen: {count_parameters(run.frozen) / 1e6:.2f}M")
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        used -= memory.alias_size_in_bytes
        say(f"compiled step: {used / 2**20:.0f} MiB per device, {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP")
    return program
