"""Lockstep rollouts: what is stepped, rendered and recorded, and what a bad policy hears."""

import sys

import numpy as np
import pytest

from rlawm_jax import sim
from rlawm_jax.sim.rollout import rollout, still, uniform, watching
from tests.sim.stick import TASK, Pusher, Stick


def test_an_episode_ends_at_the_first_step_of_success_and_else_at_the_last_step():
    done, stuck = rollout(Stick, watching(Pusher(), 2), [200, 600])
    # 0.2 + 0.1 a step exceeds 0.85 at the seventh; 0.6 is past the middle and stays
    assert (done.success, done.steps) == (True, 7)
    np.testing.assert_allclose(done.scores, np.arange(3, 10) / 10, atol=1e-6)  # float32 actions
    assert (stuck.success, stuck.steps) == (False, TASK.max_steps)


def test_a_world_is_rendered_only_for_observations_of_the_policy():
    episodes = rollout(Stick, watching(Pusher(rows=8), 3), [600, 600, 600])
    assert [episode.world.renders for episode in episodes] == [3, 3, 3]  # at steps 0, 8 and 16 of 20
    assert all(episode.frames is None for episode in episodes)


def test_a_recorded_episode_has_a_frame_before_and_after_every_step():
    recorded, other = rollout(Stick, watching(Pusher(), 2), [100, 600], videos=1)
    assert other.frames is None
    assert len(recorded.frames) == recorded.steps + 1
    assert [frame[0, 0, 0] for frame in recorded.frames] == [10, *(round(100 * score) for score in recorded.scores)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_outcomes_do_not_depend_on_the_batch_size_and_every_batch_is_full(batch_size):
    policy = Pusher(rows=3)
    seeds = [0, 100, 200, 450, 600]
    episodes = rollout(Stick, watching(policy, batch_size), seeds)
    alone = [rollout(Stick, watching(Pusher(rows=3), 1), [seed])[0] for seed in seeds]
    assert [episode.scores for episode in episodes] == [episode.scores for episode in alone]
    assert set(policy.batches) == {batch_size}


def test_progress_counts_every_step_of_the_budget_once():
    heard = []
    rollout(Stick, watching(Pusher(), 2), [200, 600], progress=heard.append)
    assert sum(heard) == 2 * TASK.max_steps


def test_still_changes_nothing_and_random_depends_on_the_seed_alone():
    held = rollout(Stick, still(4), [300])[0]
    assert held.scores == [0.3] * TASK.max_steps
    both, one = rollout(Stick, uniform(4), [300, 310]), rollout(Stick, uniform(4), [310])
    assert both[1].scores == one[0].scores
    assert len(set(one[0].scores)) > 3


class Odd:
    """A policy that answers one fixed array."""

    image_size = 6

    def __init__(self, actions):
        self.actions = actions

    def act(self, frames):
        return self.actions


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (1, 8, 2), (2, 0, 2)])
def test_actions_of_another_shape_are_one_line(shape):
    with pytest.raises(ValueError, match=r"policy: expected actions \[2, 1 or more, 2\].*found \[") as error:
        rollout(Stick, watching(Odd(np.zeros(shape)), 2), [0, 1])
    assert "\n" not in str(error.value)


def test_nonfinite_actions_name_the_seed_and_the_step():
    actions = np.zeros((2, 8, 2))
    actions[1, 3, 0] = np.nan
    with pytest.raises(FloatingPointError, match="found NaN or infinity for seed 31 at step 0"):
        rollout(Stick, watching(Odd(actions), 2), [30, 31])


def test_an_unknown_simulator_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of pusht, panda_touch, .*, found 'maze'"):
        sim.make("maze", 64)
    for module in [name for name in sys.modules if name.startswith(("gym_pusht", "data.pusht", "rlawm_jax.sim.pusht"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(ValueError, match=r"expected the package gym_pusht.*requirements-demo\.txt"):
        sim.make("pusht", 64)


def test_a_bounded_number_of_worlds_serves_every_seed():
    made = []

    def make():
        made.append(Stick())
        return made[-1]

    seeds = [200, 600, 100, 700, 300]
    few = rollout(make, watching(Pusher(), 2), seeds, worlds=2, videos=1)
    assert len(made) == 2
    many = rollout(Stick, watching(Pusher(), 2), seeds)
    assert [episode.scores for episode in few] == [episode.scores for episode in many]
    assert [episode.seed for episode in few] == seeds
    assert [episode.frames is not None for episode in few] == [True, False, False, False, False]
