"""Starts are frames of held-out episodes, with what a simulator needs to go there."""

import numpy as np
import pytest

from data.pipeline import WindowLoader
from rlawm_jax.interactive.starts import Starts
from tests.tiny_run import LENGTH, episode, tiny_config


@pytest.fixture(scope="module")
def loader(tiny_root):
    return WindowLoader(tiny_config(tiny_root, **{"data.source": "frames"}).data)


def test_starts_are_the_recorded_frames_of_held_out_episodes(loader):
    starts = Starts(loader, seed=0)
    for number in range(6):
        start, recorded = starts[number], episode(starts[number].episode)
        assert start.episode in (0, 1)
        np.testing.assert_array_equal(start.image, recorded.frames[start.frame])
        np.testing.assert_array_equal(start.recorded, recorded.actions[start.frame])
        assert start.before is None  # no states were recorded


def test_episodes_take_turns_and_after_the_last_start_comes_the_first(loader):
    starts = Starts(loader, seed=0)
    assert {starts[0].episode, starts[1].episode} == {0, 1}
    count = len(starts._windows)
    assert 2 * (LENGTH - 3) <= count < 2 * LENGTH
    assert len({(starts[i].episode, starts[i].frame) for i in range(count)}) == count
    assert (starts[count].episode, starts[count].frame) == (starts[0].episode, starts[0].frame)


def test_a_run_that_holds_nothing_out_is_told_in_one_line(tiny_root):
    loader = WindowLoader(tiny_config(tiny_root, **{"data.source": "frames", "data.val_episodes": 0}).data)
    with pytest.raises(ValueError, match=r"pusht:play: expected held-out episodes .* found none") as error:
        Starts(loader, seed=0)
    assert "\n" not in str(error.value)
