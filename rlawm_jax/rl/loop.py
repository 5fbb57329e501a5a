"""The loop around the compiled iterations: calls, logs, checkpoints, and the imagined return before and after."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from rlawm_jax.evaluation.closed_loop import Imagined, write_imagined
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.hosts import compiled, once
from rlawm_jax.policy.checkpoint import policy_meta
from rlawm_jax.rl.demonstrations import Bank
from rlawm_jax.rl.learner import Frozen, jit_run
from rlawm_jax.rl.setup import RLRun, evaluation_starts
from rlawm_jax.rng import stream
from rlawm_jax.run_folder.checkpoint import STATE, Checkpointer
from rlawm_jax.run_folder.lock import RunLock
from rlawm_jax.run_folder.logging import MetricLogger, progress, say
from rlawm_jax.run_folder.signals import interruptible
from rlawm_jax.sharding import on_mesh, replicated

SPLITS = ("training", "held-out")


def train(run: RLRun, workdir: Path) -> None:
    """Run config.train.iterations, from the newest intact checkpoint in `workdir` or from the start.

    Writes metrics.jsonl, checkpoints that `load_policy` reads, and the imagined returns of the policy's mean actions
    from first frames of held-out demonstrations, before and after, for the closed-loop table. SIGTERM and Ctrl-C save
    and end the process with status 128 + signal.
    """
    config = run.config.train
    if config.checkpoint_every % config.iterations_per_call or config.iterations % config.iterations_per_call:
        raise ValueError(
            f"config.train.iterations_per_call: expected a divisor of checkpoint_every={config.checkpoint_every} and "
            f"iterations={config.iterations}, found {config.iterations_per_call}"
        )
    with RunLock(workdir), closing(Checkpointer(workdir, keep=config.keep_checkpoints)) as checkpoints:
        banks = zip(SPLITS, (run.frozen.bank, run.held_out), strict=True)
        measures = {name: imagined_returns(run, bank) for name, bank in banks}
        returns_before = {name: measure(run.state.params) for name, measure in measures.items()}
        start = restore(run, checkpoints)
        with closing(MetricLogger(workdir, run.config, resumed_from=start)) as logger:
            _iterate(run, checkpoints, logger, start)
        returns_after = {name: measure(run.state.params) for name, measure in measures.items()}
    found = {
        name: Imagined(returns_before[name], returns_after[name], list(range(len(returns_after[name]))))
        for name in SPLITS
    }
    for name, returns in found.items():
        before, after, gain = (format_estimate(e, 3) for e in returns.estimates().values())
        say(
            f"imagined return, {len(returns.after)} {name} demonstrations: "
            f"{before} cloned, {after} after PPO, gain {gain}"
        )
    once(lambda: write_imagined(workdir, found["held-out"]))


def _iterate(run: RLRun, checkpoints: Checkpointer, logger: MetricLogger, start: int) -> None:
    config = run.config.train
    per_call = config.iterations_per_call
    if start >= config.iterations:
        return
    step = compiled(jit_run(run.learner, run.state, run.frozen, run.mesh, per_call), run.state, run.frozen)
    with interruptible() as interrupt, progress(config.iterations, start, "PPO in imagination") as bar:
        bar.unit = "iteration"
        for done in range(start + per_call, config.iterations + 1, per_call):
            clock = time.perf_counter()
            run.state, metrics = step(run.state, run.frozen)
            metrics = {name: np.asarray(values) for name, values in jax.device_get(metrics).items()}
            seconds = (time.perf_counter() - clock) / per_call
            _check_finite(metrics, done, checkpoints)
            for i in range(per_call):
                row = {f"rl/{name}": float(values[i]) for name, values in metrics.items()}
                logger.write(done - per_call + i + 1, row)
            logger.write(done, {"time/iteration_seconds": seconds})
            bar.set_postfix(reward=f"{metrics['reward'].mean():.3f}", kl=f"{metrics['kl'].mean():.3g}", refresh=False)
            bar.update(per_call)
            stop = interrupt.requested(done)
            if stop or done % config.checkpoint_every == 0 or done == config.iterations:
                save(run, checkpoints, done)
            if stop:
                checkpoints.wait()
                say(f"stopped and saved after iteration {done}; the same command goes on from there")
                sys.exit(interrupt.exit_status)


def save(run: RLRun, checkpoints: Checkpointer, iteration: int) -> None:
    """A checkpoint that acts (`load_policy`) and from which the learner goes on."""
    policy = nnx.state(run.policy())
    checkpoints.save(iteration, run.state, policy, {"policy": run.config.policy}, policy_meta(run.policy_config))


def restore(run: RLRun, checkpoints: Checkpointer) -> int:
    """Go on from the newest checkpoint where there is one; returns the iterations done."""
    step = checkpoints.latest_intact()
    if step is None:
        return 0
    origin = checkpoints.data(step)["policy"]
    if origin != run.config.policy:
        raise ValueError(
            f"config.policy: expected {origin}, which {checkpoints.directory} started from, found "
            f"{run.config.policy}; correct it or choose another --workdir"
        )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)
    run.state = checkpoints.arrays(step, **{STATE: abstract})[STATE]
    say(f"resuming from iteration {step} in {checkpoints.directory}")
    return step


def imagined_returns(run: RLRun, bank: Bank) -> Callable[[nnx.State], list[float]]:
    """From a policy's parameters to the returns of its mean actions, one per demonstration, starts and noise fixed."""
    frozen, starts = run.frozen._replace(bank=bank), evaluation_starts(bank, run.config.eval.episodes)

    def returns(params: nnx.State, frozen: Frozen) -> Array:
        key = stream(jax.random.key(run.config.eval.seed), "imagined_returns")
        return run.learner.returns(params, frozen, *starts, key)["return"]

    jitted = jax.jit(on_mesh(returns, run.mesh), out_shardings=replicated(run.mesh))
    program = compiled(jitted, run.state.params, frozen)
    return lambda params: np.asarray(program(params, frozen)).tolist()


def _check_finite(metrics: dict[str, np.ndarray], done: int, checkpoints: Checkpointer) -> None:
    broken = sorted(name for name, values in metrics.items() if not np.isfinite(values).all())
    if broken:
        checkpoints.wait()
        raise FloatingPointError(
            f"iteration {done} or one of the last few: {', '.join(broken)} not finite; the last good checkpoint is "
            f"{checkpoints.latest()}; lower config.ppo.learning_rate"
        )
