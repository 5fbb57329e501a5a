"""The guarded step, compiled: a step that is not a number leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.training.nonfinite import broken_parts, guarded, unhalted
from rlawm_jax.training.state import TrainState


def step(state, frozen, batch):
    """Adds x to everything; not finite where x is not."""
    x = batch["x"]
    new = jax.tree.map(lambda leaf: leaf + x.astype(leaf.dtype), state)._replace(step=state.step + 1)
    return new, {"rla/loss": x, "rla/finite": jnp.isfinite(x).astype(jnp.float32), "denoiser/finite": jnp.ones(())}


def run(on_nonfinite: str, numbers: list[float]) -> tuple[TrainState, list[dict]]:
    state = TrainState(jnp.int32(0), {"rla": jnp.zeros(3)}, {"rla": jnp.zeros(2)}, jnp.float32(1.0))
    compiled, metrics = jax.jit(guarded(step, on_nonfinite), donate_argnums=0), []
    for x in numbers:
        state, measured = compiled(state, {}, {"x": jnp.float32(x)})
        metrics.append({name: float(value) for name, value in measured.items()})
    return state, metrics


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_skip_goes_on_as_if_the_step_had_been_nothing(bad):
    state, metrics = run("skip", [1, bad, 2])
    assert state.step == 3
    assert all((leaf == 3).all() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert [broken_parts(m) for m in metrics] == [[], ["rla"], []]


@pytest.mark.parametrize("later", [[], [5.0], [5.0, np.nan, 7.0]])
def test_stop_keeps_the_last_good_state_whatever_comes_after(later):
    expected, _ = run("stop", [1, 2])
    halted, _ = run("stop", [1, 2, np.nan, *later])
    assert halted.step < 0
    for left, right in zip(*map(jax.tree.leaves, (unhalted(halted), expected)), strict=True):
        np.testing.assert_array_equal(left, right)
