"""Trace files of any world: what is kept, and that a damaged or foreign file is refused in one line."""

import dataclasses

import numpy as np
import pytest

from data.schema import EpisodeError
from data.traces import Trace, TraceFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Walk(Trace):
    end: np.ndarray
    steps: int

    def deviation(self, world):
        return None if np.array_equal(world.state, self.end) else (f"to end at {self.end}", f"{world.state}")


class Line:
    """A point that moves by its actions."""

    def reset(self, state):
        self.state = state

    def step(self, action):
        self.state = self.state + action

    def render(self):
        return np.full((2, 2, 3), round(self.state[0]), np.uint8)


@pytest.fixture
def files(tmp_path):
    return TraceFiles(Walk, lambda: {"line": "1.0"}, tmp_path, np.int8, scale=10.0, low=-1.0, high=1.0)


@pytest.fixture
def walks(files):
    """Two walks of 3 and 5 frames from 7, in steps of 1."""
    actions = [np.ones((length, 2), np.float32) for length in (3, 5)]
    return [Walk(np.full(2, 7.0), rows, np.full(2, 6.0 + len(rows)), len(rows)) for rows in actions]


def test_what_is_saved_is_loaded_with_its_versions(files, walks, tmp_path):
    files.save(tmp_path / "walks.npz", walks)
    loaded, versions = files.load(tmp_path / "walks.npz")
    assert versions == {"line": "1.0"}
    for before, after in zip(walks, loaded, strict=True):
        for field in dataclasses.fields(Walk):
            np.testing.assert_array_equal(getattr(before, field.name), getattr(after, field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["walks.npz"]


def test_quantised_actions_survive_the_file(files, walks, tmp_path):
    actions = files.quantise(np.random.default_rng(0).normal(0, 1, (3, 2)))
    files.save(tmp_path / "walks.npz", [dataclasses.replace(walks[0], actions=actions)])
    np.testing.assert_array_equal(files.load(tmp_path / "walks.npz")[0][0].actions, actions)
    assert np.abs(actions).max() <= 1.0


def test_a_replay_sees_frame_and_state_before_the_action_and_never_executes_the_last(files, walks):
    frames, states = files.replay(walks[0], Line(), "walk 0", {})
    np.testing.assert_array_equal(states, [[7, 7], [8, 8], [9, 9]])
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [7, 8, 9])
    assert files.replay(walks[0], Line(), "walk 0", {}, render=False)[0] is None


def test_a_replay_that_deviates_names_episode_expectation_and_both_versions(files, walks):
    wrong = dataclasses.replace(walks[0], end=np.zeros(2))
    with pytest.raises(EpisodeError) as error:
        files.replay(wrong, Line(), "walk 0", {"line": "0.9"})
    assert str(error.value) == (
        "walk 0: replay: expected to end at [0. 0.] as recorded with {'line': '0.9'}, found [9. 9.] with "
        "{'line': '1.0'}; install the pins of launch/requirements-demo.txt on x86-64 Linux"
    )


def rewrite(path, **changes):
    """The same file with arrays replaced, or left out where None is given."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"actions.npy") + 40] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "File is not a zip file"),
        (lambda path: path.write_bytes(b""), "No data left in file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "pickled"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), ""),
        (flip, ""),
        (lambda path: rewrite(path, end=None, line=None), "no end, line"),
        (lambda path: rewrite(path, length=np.array([3, 4])), "8 actions for 7 frames"),
        (lambda path: rewrite(path, steps=np.array([3])), "argument"),
        (lambda path: rewrite(path, steps=np.array([3, None])), "allow_pickle"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(files, walks, tmp_path, spoil, found):
    path = tmp_path / "walks.npz"
    files.save(path, walks)
    spoil(path)
    with pytest.raises(EpisodeError) as error:
        files.load(path)
    text = str(error.value)
    expected = f"{path}: expected a trace file of actions, end, length, line, start, steps, found: "
    assert text.startswith(expected) and text.endswith("; restore it from git") and "\n" not in text
    assert found in text
