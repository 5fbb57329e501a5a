"""The real Push-T behind the protocol: starts, what a policy sees, the score, recorded demonstrations played back."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("gym_pusht", reason="pip install -r launch/requirements-demo.txt")

from gym_pusht.envs.pusht import PushTEnv  # noqa: E402

from configs import pusht_rl  # noqa: E402
from data.pusht import motion, plan, traces  # noqa: E402
from data.pusht.sim import PushT  # noqa: E402
from rlawm_jax.sim import make  # noqa: E402
from rlawm_jax.sim.pusht import TASK, PushTSimulator  # noqa: E402
from rlawm_jax.sim.rollout import rollout, still  # noqa: E402

SEEDS = range(10_000, 10_200)


@pytest.fixture(scope="module")
def demos():
    return traces.load(traces.FOLDER / "demo.npz")[0]


@pytest.fixture(scope="module")
def starts():
    return np.stack([PushTSimulator(32).start(seed) for seed in SEEDS])


def test_imagined_actions_are_clipped_as_the_simulators():
    env = pusht_rl.get_config().env
    assert (env.action_low, env.action_high) == (TASK.action_low, TASK.action_high)


def test_the_starts_of_the_seeds_never_change(starts):
    np.testing.assert_allclose(
        starts[0], [127.59645083, 106.79810187, 230.53571435, 320.9557675, 3.24646154], atol=1e-7
    )


def test_no_training_episode_starts_where_an_evaluation_does(starts, demos):
    recorded = np.stack([trace.start for trace in [*demos, *traces.load(traces.FOLDER / "play.npz")[0]]])
    distance = np.abs(starts[:, None, :4] - recorded[None, :, :4]).max(axis=-1)
    assert distance.min() > 0.5  # pixels


def test_starts_follow_the_demonstrations_distribution(starts):
    low, high = plan.START_CENTRES
    centres = np.stack([motion.centre(start[2:]) for start in starts])
    for values, ends in ((centres[:, 0], (low, high)), (centres[:, 1], (low, high)), (starts[:, 4], (0, 2 * np.pi))):
        shares = np.histogram(values, bins=4, range=ends)[0] / len(starts)
        assert shares.sum() == pytest.approx(1)
        # 25 % +- 4 standard errors in every quarter
        assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(starts))


def test_the_budget_and_the_threshold_hold_as_stated(demos):
    assert int(1.5 * max(len(trace.actions) for trace in demos)) == TASK.max_steps
    assert PushTEnv().success_threshold == TASK.success_above
    assert TASK.action_dim == 2


def test_a_policy_sees_what_the_dataset_holds_and_equal_seeds_start_equally():
    world, other, recorded = make("pusht", 48), make("pusht", 48), PushT(48)
    world.reset(10_007)
    for _ in range(3):
        world.step(np.array([100.0, 100.0]))
    for simulator in (world, other):  # one used, one fresh
        simulator.reset(10_008)
    recorded.reset(PushTSimulator(32).start(10_008))
    for _ in range(5):
        for simulator in (world, other, recorded):
            simulator.step(np.array([256.0, 256.0]))
    frame = world.render()
    assert frame.shape == (48, 48, 3) and frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, recorded.render())
    np.testing.assert_array_equal(frame, other.render())
    assert world.score() == recorded.coverage()


def test_actions_are_clipped_to_the_workspace():
    inside, outside = make("pusht", 32), make("pusht", 32)
    for world, action in ((inside, [512.0, 0.0]), (outside, [1e9, -300.0])):
        world.reset(10_000)
        world.step(np.array(action))
    np.testing.assert_array_equal(inside.hold(), outside.hold())


def test_holding_still_moves_nothing():
    episode = rollout(lambda: PushTSimulator(32), still(8), [10_001])[0]
    assert episode.steps == TASK.max_steps
    assert max(episode.scores) - min(episode.scores) < 1e-9
    np.testing.assert_allclose(episode.world.hold(), PushTSimulator(32).start(10_001)[:2], atol=1e-9)


def test_demonstrations_played_back_reach_their_recorded_coverage_and_succeed(demos):
    """The whole loop, by chunks of 8, with the planner's own actions: an episode ends where the planner stopped."""

    class Recorded(PushTSimulator):
        def start(self, seed):
            return demos[seed].start

    def replay(running):
        chunks = [demos[e.seed].actions[e.steps : e.steps + 8] for e in running]
        return np.stack([np.concatenate([chunk, np.repeat(chunk[-1:], 8 - len(chunk), axis=0)]) for chunk in chunks])

    for episode in rollout(lambda: Recorded(32), replay, range(20)):
        trace = demos[episode.seed]
        assert episode.success
        assert episode.steps == len(trace.actions) - 1 - plan.REST
        for action in trace.actions[episode.steps : -1]:  # the planner's rest, in which a sliding block still moves
            episode.world.step(action)
        assert episode.world.score() == pytest.approx(trace.coverage, abs=traces.POSE_TOLERANCE)
