"""The real arm behind the protocol: exact replays, what a camera sees, the tasks, and experts that solve them."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("panda_gym", reason="needs PyBullet and panda-gym: see Versions in launch/README.md")

from configs import panda_rl  # noqa: E402
from data.panda import traces  # noqa: E402
from data.panda.builder import episode  # noqa: E402
from data.panda.record import record_demonstration, record_play  # noqa: E402
from data.panda.sim import NO_MARK, World, camera_matrix  # noqa: E402
from data.panda.tasks import TASKS, start  # noqa: E402
from data.schema import EpisodeError, validate  # noqa: E402
from rlawm_jax.sim import for_dataset, make  # noqa: E402
from rlawm_jax.sim.panda import PandaSimulator, task  # noqa: E402
from rlawm_jax.sim.rollout import rollout, still  # noqa: E402

START = np.array([0.02, 0.1, 0.12, -0.03, -0.05, 0.035, 0.3, *NO_MARK])


@pytest.fixture(scope="module")
def world():
    return World(48)


def test_a_used_world_starts_exactly_as_a_new_one(world):
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 3))
    ends = []
    for one in (world, world, World(48)):
        one.reset(START)
        np.testing.assert_allclose(one.state, START, atol=2e-4)
        for action in actions:
            one.step(action)
        ends.append(one.state)
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_imagined_actions_are_clipped_as_the_simulator_clips_them():
    env = panda_rl.get_config("demo").env
    assert (env.action_low, env.action_high) == (task("push").action_low, task("push").action_high)


def test_an_action_moves_the_gripper_its_own_way(world):
    for axis in range(3):
        world.reset(START)
        before = world.gripper
        for _ in range(4):
            world.step(0.5 * np.eye(3)[axis])
        moved = world.gripper - before
        assert moved[axis] > 0.03
        assert np.abs(np.delete(moved, axis)).max() < 0.01


def test_the_camera_matrix_says_where_things_are_in_the_frame(world):
    def seen(position):  # by hand, as data.description.from_clip does
        x, y, _, w = camera_matrix() @ [*position, 1.0]
        return np.array([(1 - y / w) / 2, (1 + x / w) / 2]) * world.image_size

    world.reset(START)
    frame = world.render().astype(int)
    green = frame[..., 1] - frame[..., [0, 2]].max(axis=-1) > 60
    found = np.argwhere(green).mean(axis=0) + 0.5
    assert green.sum() > 20
    np.testing.assert_allclose(found, seen(START[3:6]), atol=1.5)  # pixels of 48


def test_a_mark_is_seen_and_a_task_without_one_hides_it(world):
    def red(state):
        world.reset(state)
        frame = world.render().astype(int)
        return int((frame[..., 0] - frame[..., 1:].max(axis=-1) > 60).sum())

    assert red(START) == 0
    assert red(np.array([*START[:7], 0.05, 0.08])) > 5


@pytest.mark.parametrize("split", ["play", *TASKS])
def test_committed_traces_replay_exactly(world, split):
    recorded, versions = traces.load(traces.FOLDER / f"{split}.npz")
    for index in (0, len(recorded) - 1):
        one = episode(recorded[index], world, split, index, versions)
        validate(one, f"{split} {index}")
        assert one.success == (split != "play")
        assert one.frames.shape == (len(recorded[index].actions), 48, 48, 3)


def test_a_trace_that_another_physics_would_give_is_refused_in_one_line(world):
    recorded, versions = traces.load(traces.FOLDER / "touch.npz")
    import dataclasses

    wrong = dataclasses.replace(recorded[0], end=recorded[0].end + 0.01)
    with pytest.raises(EpisodeError, match=r"panda touch 0: replay: expected the world to end in .* found") as error:
        traces.replay(wrong, world, "panda touch 0", versions, render=False)
    assert "\n" not in str(error.value)


def test_recording_is_determined_by_its_seed_and_actions_fit_the_file(world):
    one, other = (record_play(np.random.default_rng([0, 1]), world, 12)[0] for _ in range(2))
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.actions, traces.quantise(one.actions))
    np.testing.assert_array_equal(one.end, other.end)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_solved_by_their_expert_and_not_by_standing_still(world, name):
    solved = [record_demonstration(np.random.default_rng([9, i]), world, name) is not None for i in range(12)]
    assert sum(solved) >= 6  # of all starts, the experts solve 75 to 99 %
    episodes = rollout(lambda: make(f"panda_{name}", 16), still(8), range(10_000, 10_004))
    assert not any(one.success for one in episodes)
    assert max(max(one.scores) - min(one.scores) for one in episodes) < 0.02  # the cube settles by a millimetre


def test_no_evaluation_starts_where_a_demonstration_did():
    for name in TASKS:
        recorded = np.stack([trace.start for trace in traces.load(traces.FOLDER / f"{name}.npz")[0]])
        simulator = PandaSimulator(16, name)
        starts = np.stack([simulator.start(seed) for seed in range(10_000, 10_100)])
        distance = np.abs(starts[:, None, :5] - recorded[None, :, :5]).max(axis=-1)
        assert distance.min() > 1e-3


def test_the_score_is_the_closeness_and_success_its_threshold(world):
    simulator = make("panda_push", 16)
    simulator.reset(10_000)
    cube = simulator.positions()[1]
    assert simulator.score() == pytest.approx(1 - np.linalg.norm(cube[:2] - [-0.02, 0.0]) / 0.25)
    assert task("push").success_above == pytest.approx(0.9)
    assert start(np.random.default_rng(0), TASKS["mark"])[7:].max() < 1.0


def test_a_recorded_state_is_reached_again_by_replaying(world):
    recorded = traces.load(traces.FOLDER / "push.npz")[0][0]
    states = traces.replay(recorded, world, "push 0", {}, render=False)[1]
    simulator = make("panda_push", 16)
    simulator.replay(states[0], recorded.actions[:10])
    np.testing.assert_allclose(simulator.positions().ravel(), states[10, :6], atol=1e-4)


@pytest.mark.parametrize(
    ("reference", "simulator"),
    [
        ("panda:play", "panda_touch"),
        ("panda/112px/1.0.0:mark", "panda_mark"),
        ("pusht:demo", "pusht"),
        ("push:play", None),
        ("folder:panda", None),
    ],
)
def test_a_dataset_is_known_to_the_simulator_that_it_was_recorded_in(reference, simulator):
    assert for_dataset(reference) == simulator
