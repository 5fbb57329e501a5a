"""A step whose state cannot be spoilt by numbers that are not finite, in training and in reinforcement learning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

STOP, SKIP = "stop", "skip"
SUFFIX = "/finite"

# (state, what it reads...) -> (state, metrics)
Step = Callable[..., tuple[Any, dict[str, Array]]]


def guarded(step: Step, on_nonfinite: str) -> Step:
    """`step` that leaves its state as it was where a metric `NAME/finite` is not 1 throughout.

    "skip": the step counts as done. "stop": the state halts, which is written as ~step in its counter, the state's
    first field: whatever step is called on a halted state returns it unchanged, so that the loop, which learns of it a
    step later, still finds the last good state (`unhalted`).
    """
    if on_nonfinite not in (STOP, SKIP):
        raise ValueError(f"config.train.on_nonfinite: expected {STOP} or {SKIP}, found {on_nonfinite!r}")

    def guarded_step(state: Any, *inputs: Any) -> tuple[Any, dict[str, Array]]:
        new, metrics = step(state, *inputs)
        good = jnp.all(jnp.stack([value > 0 for name, value in metrics.items() if name.endswith(SUFFIX)]))
        counter = new[0]
        if on_nonfinite == STOP:
            halted = state[0] < 0
            good &= ~halted
            counter = jnp.where(halted, state[0], ~state[0])
        kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return _counting(kept, jnp.where(good, new[0], counter)), metrics

    return guarded_step


def unhalted(state: Any) -> Any:
    """The last good state, from a halted one."""
    return _counting(state, ~state[0])


def with_flags(metrics: dict[str, Array]) -> dict[str, Array]:
    """The metrics with a `NAME/finite` beside each, of the same shape: 1 where it is a number."""
    return metrics | {f"{name}{SUFFIX}": jnp.isfinite(value).astype(jnp.float32) for name, value in metrics.items()}


def broken_parts(metrics: dict[str, float]) -> list[str]:
    """What was not finite, from a step's metrics on the host."""
    return [name.removesuffix(SUFFIX) for name, value in metrics.items() if name.endswith(SUFFIX) and not value]


def _counting(state: Any, counter: Array) -> Any:
    """The state with another counter; that is its first field, whatever its name."""
    return type(state)(counter, *state[1:])
