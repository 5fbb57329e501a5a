"""The probe tells right actions from wrong ones, and noise from exploration, where both are known."""

import re

import numpy as np
import pytest

from rlawm_jax.rl.exploration import Exploration
from rlawm_jax.rl.reward_probe import (
    ACTIONS,
    ANOTHERS,
    CLONED,
    KEPT,
    NOISE,
    RECORDED,
    SMOOTH,
    STILL,
    format_markdown,
    probe,
    recorded_chunks,
    smooth_label,
)
from rlawm_jax.rl.setup import prepare
from tests.rl.test_ppo_learner import make as make_toy
from tests.rl.tiny import make
from tests.rl.toy import CHUNK, EPISODES, FRAMES, STEP, ToyWorld, demonstrations


class ToyRun:
    """The toy world in the shape of an `RLRun`."""

    def __init__(self, noise: float):
        from flax import nnx

        self.learner, self.state, self.frozen = make_toy(world=ToyWorld(noise))
        self.held_out = self.frozen.bank
        rows = np.zeros((FRAMES, 3), np.float32)
        rows[:, 0] = STEP
        recorded = demonstrations(actions=[rows * (1 + i) for i in range(EPISODES)])
        right = demonstrations(actions=[rows] * EPISODES, still=[np.zeros(3, np.float32)] * EPISODES)
        self.recorded = (right, recorded)
        self.config = make_config()
        self.policy = lambda: nnx.merge(self.learner.policy, self.state.params, self.frozen.policy)
        self.model = lambda: nnx.merge(self.learner.model, self.frozen.model)


def make_config():
    from configs import rl

    return rl.get_config()


@pytest.mark.slow
def test_right_actions_score_best_and_wrong_ones_worst():
    found = probe(ToyRun(noise=0.0))["training"]
    returns = {name: estimate.value for name, estimate in found.returns.items()}
    assert returns[RECORDED] == pytest.approx(0, abs=1e-4)
    assert returns[KEPT] < returns[CLONED] < returns[RECORDED]
    # all walk by the same step here, so another's actions are as good
    assert returns[ANOTHERS] == pytest.approx(returns[RECORDED], abs=1e-6)
    # the picture stands still while the demonstration walks 0.2, 0.4, 0.6 along one of three channels
    assert returns[KEPT] == pytest.approx(-5 * (0.2**2 + 0.4**2 + 0.6**2) / 3, rel=0.02)  # the bank is bfloat16
    # the toy moves by its actions, so holding still keeps the first frame; the other split does not say how to
    assert returns[STILL] == pytest.approx(returns[KEPT], rel=1e-3)
    wrong = probe(ToyRun(noise=0.0))["held-out"]
    assert STILL not in wrong.returns
    assert wrong.returns[RECORDED].value < wrong.returns[CLONED].value


@pytest.mark.slow
def test_noise_and_exploration_are_told_apart():
    quiet, loud = (probe(ToyRun(noise))["training"].deviations for noise in (0.0, 0.5))
    assert quiet[NOISE] < 1e-6 < 1e-3 < quiet[ACTIONS]
    assert loud[NOISE] > loud[ACTIONS]
    # the toy world moves by the sum of its two rows: correlated by 0.9 they move it sqrt(1.9) times as far
    smooth = quiet[smooth_label(Exploration(CHUNK, SMOOTH))]
    assert smooth == pytest.approx(np.sqrt(1 + SMOOTH) * quiet[ACTIONS], rel=0.3)


def test_chunks_repeat_the_last_row_beyond_the_end():
    rows = np.arange(3, dtype=np.float32)[:, None]
    found = recorded_chunks(demonstrations(actions=[rows, rows + 10]), np.array([1, 0]), 2, 3)
    assert found.shape == (3, 2, 2, 1)
    assert found[:, 0, :, 0].ravel().tolist() == [10, 11, 12, 12, 12, 12]
    assert found[:, 1, :, 0].ravel().tolist() == [0, 1, 2, 2, 2, 2]


@pytest.mark.slow
def test_a_prepared_run_is_probed_on_both_splits(tiny_root, cloned):
    found = probe(prepare(make(tiny_root, cloned)), draws=2)
    assert list(found) == ["training", "held-out"]
    assert [one.returns[CLONED].count for one in found.values()] == [4, 2]
    text = format_markdown(found)
    assert text.count("\n") == 12 and re.search(r"cloned policy \| -\d", text)
