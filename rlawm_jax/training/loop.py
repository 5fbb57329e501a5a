"""The one training loop: batches in, steps out, metrics one step late, checkpoints on the way."""

import time
from pathlib import Path

import jax
import numpy as np

from rlawm_jax.checkpoint import FROZEN, STATE, Checkpointer
from rlawm_jax.logging import MetricLogger, progress, say
from rlawm_jax.sharding import shard_batch
from rlawm_jax.training.setup import Run
from rlawm_jax.training.state import count_parameters
from rlawm_jax.training.step import Metrics, jit_train_step


class NonFiniteError(FloatingPointError):
    """A loss or gradient stopped being a number; the message says where and what is saved."""


def train(run: Run, workdir: Path) -> None:
    """Train from the newest checkpoint in `workdir`, or from the start, to config.train.steps.

    Raises NonFiniteError before a non-finite state could be saved.
    """
    config = run.config.train
    checkpoints = Checkpointer(workdir, keep=config.keep_checkpoints)
    start = restore(run, checkpoints)
    if start >= config.steps:
        say(f"nothing to train: step {start} of {config.steps} is saved in {checkpoints.directory}")
        checkpoints.close()
        return
    first = next(run.iterator)
    data_state = run.iterator.get_state()
    batch = shard_batch(first, run.mesh)
    compiled = _compile(run, batch)
    logger = MetricLogger(workdir, run.config, resumed_from=start)
    pending: tuple[int, Metrics] | None = None
    clock, clock_step = time.perf_counter(), start
    with progress(config.steps, start, "train") as bar:
        for step in range(start + 1, config.steps + 1):
            run.state, metrics = compiled(run.state, run.frozen, batch)
            saved_data_state = data_state
            if step < config.steps:
                batch = shard_batch(next(run.iterator), run.mesh)  # read while the device works
                data_state = run.iterator.get_state()
            # the device is already at the next step when the previous one's metrics are fetched
            if pending is not None:
                _report(pending, logger, bar, config.log_every, checkpoints)
            pending = (step, metrics)
            if step % config.checkpoint_every == 0 or step == config.steps:
                _report(pending, logger, bar, config.log_every, checkpoints)
                pending = None
                checkpoints.save(step, run.state, run.saved_frozen(), saved_data_state, run.meta)
            if step % config.log_every == 0:
                now = time.perf_counter()
                logger.write(step, {"time/steps_per_second": (step - clock_step) / (now - clock)})
                clock, clock_step = now, step
    logger.close()
    checkpoints.close()


def restore(run: Run, checkpoints: Checkpointer) -> int:
    """Continue from the newest checkpoint where there is one; returns the number of finished steps."""
    step = checkpoints.latest()
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
    compiled = jit_train_step(run.step_fn, run.state, run.frozen, run.mesh, list(batch))
    compiled = compiled.lower(run.state, run.frozen, batch).compile()
    table = ", ".join(f"{part} {count_parameters(p) / 1e6:.2f}M" for part, p in run.state.params.items())
    say(f"trained parameters: {table}; frozen: {count_parameters(run.frozen) / 1e6:.2f}M")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        used -= memory.alias_size_in_bytes
        say(f"compiled step: {used / 2**20:.0f} MiB per device, {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP")
    return compiled


def _report(pending: tuple[int, Metrics], logger: MetricLogger, bar, log_every: int, checkpoints: Checkpointer) -> None:
    """Fetch a finished step's metrics, stop on a non-finite one, log on time."""
    step, metrics = pending
    host = {name: float(np.asarray(value)) for name, value in jax.device_get(metrics).items()}
    broken = [name.removesuffix("/finite") for name, value in host.items() if name.endswith("/finite") and not value]
    if broken:
        checkpoints.wait()
        raise NonFiniteError(
            f"step {step}: loss or gradient of {', '.join(broken)} is not finite; the last good checkpoint is "
            f"{checkpoints.latest()}; lower config.optimizer.learning_rate or set config.optimizer.clip"
        )
    bar.update(1)
    if step % log_every == 0:
        bar.set_postfix({k: f"{v:.3g}" for k, v in host.items() if k.endswith("/loss")}, refresh=False)
        logger.write(step, {k: v for k, v in host.items() if not k.endswith("/finite")})
