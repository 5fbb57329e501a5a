"""Steps whose state is protected from non-finite numbers, in training and in reinforcement learning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

STOP, SKIP = "stop", "skip"
SUFFIX = "/finite"

# (state, inputs...) -> (state, metrics)
Step = Callable[..., tuple[Any, dict[str, Array]]]


def guarded(step: Step, on_nonfinite: str) -> Step:
    """`step`, leaving its state unchanged if any metric `NAME/finite` is not 1 throughout.

    "skip": the step counts as done. "stop": the state is halted, marked by ~step in its counter, the state's first
    field. Any step called on a halted state returns it unchanged, so that the loop, which learns of it one step later,
    still finds the last good state (`unhalted`).
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
    """The last good state, recovered from a halted one."""
    return _counting(state, ~state[0])


def with_flags(metrics: dict[str, Array]) -> dict[str, Array]:
    """The metrics, each with a `NAME/finite` of the same shape that is 1 where the value is finite."""
    return metrics | {f"{name}{SUFFIX}": jnp.isfinite(value).astype(jnp.float32) for name, value in metrics.items()}


def broken_parts(metrics: dict[str, float]) -> list[str]:
    """The names that were not finite, from a step's metrics on the host."""
    return [name.removesuffix(SUFFIX) for name, value in metrics.items() if name.endswith(SUFFIX) and not value]


def _counting(state: Any, counter: Array) -> Any:
    """The state with another counter, which is its first field under any name."""
    return type(state)(counter, *state[1:])
