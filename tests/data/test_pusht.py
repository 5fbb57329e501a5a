import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.sim
pytest.importorskip("gym_pusht", reason="pip install -r launch/requirements-demo.txt")

import shapely  # noqa: E402
from gym_pusht.envs.pusht import PushTEnv  # noqa: E402

from data.episodes import EpisodeStore  # noqa: E402
from data.pusht import motion, plan, traces  # noqa: E402
from data.pusht.play import has_moved  # noqa: E402
from data.pusht.rehearsal import Rehearsal, agent_way, coverage  # noqa: E402
from data.pusht.sim import AGENT_RADIUS, PushT  # noqa: E402
from data.schema import EpisodeError  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demos():
    return traces.load(traces.FOLDER / "demo.npz")


@pytest.fixture(scope="module")
def play():
    return traces.load(traces.FOLDER / "play.npz")


def test_there_are_enough_demonstrations_that_solve_the_task_no_slower_than_a_person(demos):
    lengths = np.array([len(trace.actions) for trace in demos[0]])
    assert len(lengths) >= 110, "ten are validation, at least 100 train"
    assert min(trace.coverage for trace in demos[0]) >= 0.9
    assert lengths.max() <= 200
    assert lengths.mean() <= 125, "human demonstrations of this task average about 125 steps at 10 Hz"


def test_demonstrations_start_all_over_the_stated_distribution(demos):
    starts = np.stack([trace.start for trace in demos[0]])
    centres = np.stack([motion.centre(start[2:]) for start in starts])
    low, high = plan.START_CENTRES
    assert centres.min() >= low
    assert centres.max() <= high
    assert starts[:, :2].min() >= 30
    assert starts[:, :2].max() <= 482
    # Uniform in each coordinate and the angle: each quarter of the range holds 25 % +- 4 standard errors.
    for values, (a, b) in [(centres[:, 0], (low, high)), (centres[:, 1], (low, high)), (starts[:, 4], (0, 2 * np.pi))]:
        shares = np.histogram(values, bins=4, range=(a, b))[0] / len(starts)
        assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(starts))


def test_committed_demonstrations_replay_to_their_recorded_coverage(demos):
    sim = PushT()
    for index in (0, 9, 10, 57, 109):
        trace = demos[0][index]
        traces.replay(trace, sim, f"demo {index}", demos[1], render=False)
        assert sim.coverage() >= 0.9
        np.testing.assert_allclose(sim.block, trace.final_block, atol=traces.POSE_TOLERANCE)


def test_replay_is_deterministic_and_does_not_depend_on_what_ran_before(play):
    recorded, versions = play
    fresh, used = PushT(64), PushT(64)
    traces.replay(recorded[1], used, "play 1", versions, render=False)
    first = traces.replay(recorded[0], fresh, "play 0", versions)
    second = traces.replay(recorded[0], used, "play 0", versions)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_replay_that_ends_elsewhere_gives_one_line_with_episode_and_versions(play):
    recorded, _ = play
    moved = dataclasses.replace(recorded[0], final_block=recorded[0].final_block + 0.01)
    with pytest.raises(EpisodeError) as error:
        traces.replay(moved, PushT(), "pusht play episode 0", {"pymunk": "6.0.0"}, render=False)
    text = str(error.value)
    assert text.startswith("pusht play episode 0: replay: expected the block to end at [")
    assert "recorded with {'pymunk': '6.0.0'}" in text
    assert "requirements-demo.txt" in text
    assert "\n" not in text


def test_state_and_frame_t_are_seen_before_action_t_in_the_unmodified_environment(play):
    """gym-pusht itself, set to state 0 and given action t at state t, sees every recorded next state and frame."""
    recorded, versions = play
    frames, states = traces.replay(recorded[3], PushT(64), "play 3", versions)
    env = PushTEnv(obs_type="pixels", observation_width=64, observation_height=64)
    start = recorded[3].start
    shift = motion.CENTRE_OF_GRAVITY - motion.rotation(start[4]) @ motion.CENTRE_OF_GRAVITY
    env.reset(options={"reset_to_state": np.array([*start[:2], *(start[2:4] - shift), start[4]])})
    for t, action in enumerate(recorded[3].actions[:-1]):
        frame, _, _, _, info = env.step(action.astype(np.float64))
        seen = np.array([*info["pos_agent"], *info["block_pose"]])
        seen[4] %= 2 * np.pi
        # float32 of values up to 512
        np.testing.assert_allclose(states[t + 1], seen, atol=1e-4)
        np.testing.assert_array_equal(frames[t + 1], frame)
    assert info["coverage"] == pytest.approx(recorded[3].coverage, abs=1e-9)


def test_reset_gives_exactly_the_requested_state():
    sim = PushT()
    state = np.array([50.0, 400.0, 300.5, 210.25, 1.0])
    sim.reset(state)
    np.testing.assert_allclose(sim.state, state, atol=1e-9)


def test_play_touches_the_block_most_of_the_time_and_keeps_it_in_the_workspace(play):
    recorded, versions = play
    sim, moving = PushT(), []
    for index in range(0, 240, 6):
        states = traces.replay(recorded[index], sim, f"play {index}", versions, render=False)[1]
        moving += [has_moved(*pair) for pair in itertools.pairwise(states[:, 2:])]
        centres = np.stack([motion.centre(row[2:]) for row in states])
        assert centres.min() > 60
        assert centres.max() < 452
    # Forty episodes; over all 240 the share is 57 %.
    assert np.mean(moving) > 0.5


READ_BACK = """
import sys
import numpy as np
from data import schema
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory("{path}")
for split in ("play", "demo"):
    source = builder.as_data_source(split)
    assert len(source) == 2
    for index in range(2):
        episode = schema.from_example(source[index])
        schema.validate(episode, split)
        assert episode.episode_id == index and episode.frames.shape[1:] == (40, 40, 3)
        assert np.allclose(episode.effector_position * 512, episode.state[:, :2], atol=1e-3)
        assert episode.success or split == "play"
assert "512" in builder.info.metadata["length_unit"]
print(sorted({{"tensorflow", "pygame", "pymunk", "gym_pusht", "data.pusht"}} & set(sys.modules)))
"""


def test_dataset_is_built_once_and_read_without_tensorflow_or_simulator(tmp_path):
    command = [sys.executable, "-m", "data.build", "pusht", f"--data_dir={tmp_path}", "--image_size=40", "--limit=2"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    path = tmp_path / "pusht" / "40px_first2" / "1.0.0"
    stamps = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "already built" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == stamps
    code = READ_BACK.format(path=path)
    read = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert read.stdout.strip() == "[]"


def test_the_pusher_is_seen_where_the_projection_puts_it_and_its_own_position_holds_it_still(tmp_path):
    command = [sys.executable, "-m", "data.build", "pusht", f"--data_dir={tmp_path}", "--limit=1"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    store = EpisodeStore(tmp_path, "pusht:play")
    projection, episode = store.description.projection, store.episode(0)
    for t in (0, 10, 25):
        blue = np.abs(episode.frames[t].astype(int) - np.array([65, 105, 225])).sum(axis=-1) < 60
        seen = np.argwhere(blue).mean(axis=0)[::-1] / len(blue)
        np.testing.assert_allclose(projection.place(episode.effector_position[t]), seen, atol=0.015)
        near = store.near_patches(0, [t], (8, 8)).reshape(8, 8)
        assert near.repeat(14, axis=0).repeat(14, axis=1)[blue].all()
        sim = PushT()
        sim.reset(episode.state[t])
        sim.step(store.hold_still(0, t))
        np.testing.assert_allclose(sim.agent, episode.state[t, :2], atol=1e-3)


def test_rehearsal_agrees_with_the_simulator(play):
    """The agent exactly, the block nearly always: the simulator's contact history moves it a little."""
    sim, rehearsal, off = PushT(), Rehearsal(), []
    for trace in play[0][:12]:
        actions = trace.actions[:15].astype(np.float64)
        sim.reset(trace.start)
        for action in actions:
            sim.step(action)
        agent, block = rehearsal.carry_out(trace.start[:2], motion.Tee(trace.start[2:]), actions)
        np.testing.assert_allclose(agent, sim.agent, atol=1e-9)
        off.append(np.abs(block - sim.block).max())
        assert coverage(sim.block) == pytest.approx(sim.coverage(), abs=1e-9)
    assert np.median(off) < 0.1


def test_the_way_around_keeps_clear_of_the_block_and_ends_at_the_goal():
    rng = np.random.default_rng(0)
    for _ in range(100):
        start, goal = (motion.random_start(rng, 160, 350) for _ in range(2))
        tee = motion.Tee(start[2:])
        if tee.keep_out.contains(shapely.Point(goal[:2])) or tee.keep_out.contains(shapely.Point(start[:2])):
            continue
        way = motion.way_around(start[:2], goal[:2], tee)
        np.testing.assert_allclose(way[[0, -1]], [start[:2], goal[:2]])
        assert shapely.LineString(way).distance(tee.polygon) > AGENT_RADIUS


def test_timed_targets_keep_to_the_speed_and_end_at_the_last_point():
    points = np.array([[0.0, 0.0], [100.0, 0.0], [100.0, 73.0]])
    targets = motion.timed(points, speed=12.0)
    assert np.linalg.norm(np.diff(targets, axis=0, prepend=points[:1]), axis=1).max() <= 12.0 + 1e-9
    np.testing.assert_allclose(targets[-1], points[-1])


def test_the_agent_settles_on_its_target():
    way, velocities = agent_way(np.array([100.0, 100.0]), np.full((20, 2), 200.0))
    np.testing.assert_allclose(way[-1], 200.0, atol=1e-4)
    np.testing.assert_allclose(velocities[-1], 0.0, atol=1e-3)


def test_the_planner_solves_a_start_and_its_trace_replays():
    """A block 30 pixels off and turned by a quarter of a radian."""
    start = np.array([400.0, 120.0, 280.0, 240.0, np.pi / 4 + 0.25])
    recorded, rng = PushT(), np.random.default_rng(0)
    solutions = (plan.solve(rng, Rehearsal(), recorded, start) for _ in range(4))
    trace = next(trace for trace in solutions if trace is not None)
    assert trace.coverage > plan.DONE_COVERAGE
    _, states = traces.replay(trace, PushT(), "planned", {}, render=False)
    speeds = np.linalg.norm(np.diff(states[:, :2], axis=0), axis=1)
    # The targets move at most TRAVEL_SPEED per step, and the damped agent never overtakes them.
    assert speeds.max() <= plan.TRAVEL_SPEED + 1e-3


def test_actions_survive_the_trace_file(tmp_path, play):
    traces.save(tmp_path / "some.npz", play[0][:3])
    loaded, versions = traces.load(tmp_path / "some.npz")
    assert versions == play[1]
    for before, after in zip(play[0][:3], loaded, strict=True):
        np.testing.assert_array_equal(before.actions, after.actions)
        np.testing.assert_array_equal(before.start, after.start)


def test_a_missing_trace_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.npz: no such trace file"):
        traces.load(tmp_path / "gone.npz")
