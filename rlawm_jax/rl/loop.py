"""Reinforcement learning in a run folder: the training loop, and the imagined returns before and after it."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from rlawm_jax.evaluation.closed_loop import IMAGINED_FILE, ImaginedReturns, write_imagined
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.hosts import compiled, exchange, on_first_process
from rlawm_jax.rl.demonstrations import Bank
from rlawm_jax.rl.learner import Frozen
from rlawm_jax.rl.learners import TITLES
from rlawm_jax.rl.setup import RLRun, evaluation_starts
from rlawm_jax.rng import stream
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.sharding import on_mesh, replicated
from rlawm_jax.training.loop import open_run, run_steps

SPLITS = ("training", "held-out")


def train(run: RLRun, workdir: Path) -> None:
    """Run config.train.iterations, from the newest intact checkpoint in `workdir` or from the start.

    Like `training.loop.train`, with checkpoints that `load_policy` reads, and with the imagined returns of the policy's
    mean actions from first frames of held-out demonstrations, before and after, for the closed-loop table.
    """
    check_calls(run.config.train)
    with open_run(run, workdir) as checkpoints:
        start = checkpoints.latest_intact() or 0
        check_calls(run.config.train, saved=start)
        if start >= run.steps and exchange((workdir / IMAGINED_FILE).is_file())[0]:
            run_steps(run, checkpoints, workdir)  # reports that there is nothing to do
            return
        measures = {
            name: imagined_returns(run, bank)
            for name, bank in zip(SPLITS, (run.frozen.bank, run.held_out), strict=True)
        }
        before = {name: measure(run.state.params) for name, measure in measures.items()}
        run_steps(run, checkpoints, workdir)
        after = {name: measure(run.state.params) for name, measure in measures.items()}
        imagined = {name: ImaginedReturns(before[name], after[name], list(range(len(after[name])))) for name in SPLITS}
        on_first_process(lambda: write_imagined(workdir, imagined["held-out"]))
    for name, returns in imagined.items():
        cloned, improved, gain = (format_estimate(e, 3) for e in returns.estimates().values())
        announce(
            f"imagined return, {len(returns.after)} {name} demonstrations: "
            f"{cloned} cloned, {improved} after {TITLES[run.config.learner]}, gain {gain}"
        )


def check_calls(config: ConfigDict, saved: int = 0) -> None:
    """Raise ValueError where iterations (per checkpoint, of the run, or saved) are not a whole number of calls."""
    if any(n % config.iterations_per_call for n in (config.checkpoint_every, config.iterations, saved)):
        also = f" and the {saved} iterations saved" if saved else ""
        raise ValueError(
            f"config.train.iterations_per_call: expected a divisor of checkpoint_every={config.checkpoint_every} and "
            f"iterations={config.iterations}{also}, found {config.iterations_per_call}"
        )


def imagined_returns(run: RLRun, bank: Bank) -> Callable[[nnx.State], list[float]]:
    """A function from policy parameters to mean-action returns, one per demonstration, with fixed starts and noise."""
    frozen, starts = run.frozen._replace(bank=bank), evaluation_starts(bank, run.config.eval.episodes)

    def returns(params: nnx.State, frozen: Frozen) -> Array:
        key = stream(jax.random.key(run.config.eval.seed), "imagined_returns")
        return run.learner.returns(params, frozen, *starts, key)["return"]

    jitted = jax.jit(on_mesh(returns, run.mesh), out_shardings=replicated(run.mesh))
    program = compiled(jitted, run.state.params, frozen)
    return lambda params: np.asarray(program(params, frozen)).tolist()
