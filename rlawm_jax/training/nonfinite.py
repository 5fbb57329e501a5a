"""A training step whose state cannot be spoilt by a loss or gradient that is not a number."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from rlawm_jax.training.state import TrainState
from rlawm_jax.training.step import Metrics, TrainStep

STOP, SKIP = "stop", "skip"
SUFFIX = "/finite"


def guarded(step: TrainStep, on_nonfinite: str) -> TrainStep:
    """`step` that leaves parameters, moments and latent scale as they were where a loss or gradient is not finite.

    "skip": the step counts as done. "stop": the state halts, which is written as ~step in its step counter: whatever
    step is called on a halted state returns it unchanged, so that the loop, which learns of it a step later, still
    finds the last good state (`unhalted`).
    """
    if on_nonfinite not in (STOP, SKIP):
        raise ValueError(f"config.train.on_nonfinite: expected {STOP} or {SKIP}, found {on_nonfinite!r}")

    def guarded_step(state: TrainState, frozen: nnx.State, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        new, metrics = step(state, frozen, batch)
        good = jnp.all(jnp.stack([value > 0 for name, value in metrics.items() if name.endswith(SUFFIX)]))
        counter = state.step + 1
        if on_nonfinite == STOP:
            halted = state.step < 0
            good &= ~halted
            counter = jnp.where(halted, state.step, ~state.step)
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return kept._replace(step=jnp.where(good, new.step, counter)), metrics

    return guarded_step


def unhalted(state: Any) -> Any:
    """The last good state, from a halted one."""
    return state._replace(step=~state.step)


def broken_parts(metrics: dict[str, float]) -> list[str]:
    """The parts whose loss or gradient was not finite, from a step's metrics on the host."""
    return [name.removesuffix(SUFFIX) for name, value in metrics.items() if name.endswith(SUFFIX) and not value]
