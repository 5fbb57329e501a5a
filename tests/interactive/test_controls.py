"""Which key moves what, by how much, and what is no action row."""

import numpy as np
import pytest

from data.description import Projection, from_clip
from rlawm_jax.interactive.controls import ActionError, Controls, controls, seen_keys
from tests.interactive.tiny import Store

CONTROLS = Controls((-1.0, 0.0), (1.0, 512.0), (0.5, 20.0), ())


def ways(projection, dimensions):
    return {key.name: (key.dimension, key.sign) for key in seen_keys(projection, dimensions)}


def test_without_a_camera_right_and_up_are_positive():
    expected = {
        "ArrowRight": (0, 1), "ArrowLeft": (0, -1), "ArrowUp": (1, 1), "ArrowDown": (1, -1), "w": (2, 1), "s": (2, -1)
    }  # fmt: skip
    assert ways(None, 3) == expected
    assert ways(None, 7) == expected
    assert ways(None, 1) == {"ArrowRight": (0, 1), "ArrowLeft": (0, -1)}


def test_keys_move_the_robot_the_way_they_point_in_the_picture():
    # seen from above with y downwards, as Push-T is
    above = Projection(np.eye(3), 0.1, 0.1)
    assert ways(above, 2) == {
        "ArrowRight": (0, 1), "ArrowLeft": (0, -1), "ArrowUp": (1, -1), "ArrowDown": (1, 1)
    }  # fmt: skip
    # a camera that looks along -x from the robot's front: its y is to the right, x comes closer and so lower
    clip = np.array([[0, 1, 0, 0], [-0.5, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    front = Projection(from_clip(clip), 0.1, 0.1)
    assert ways(front, 3) == {
        "ArrowRight": (1, 1), "ArrowLeft": (1, -1), "ArrowUp": (0, -1), "ArrowDown": (0, 1), "w": (2, 1), "s": (2, -1)
    }  # fmt: skip
    assert ways(front, 4) == ways(None, 4)  # joints, say: no coordinates of the picture


def test_bounds_are_the_simulators_or_else_the_recordings():
    store = Store()
    recorded = np.concatenate([store.actions(row) for row in range(len(store))])
    given = controls(store, ((-1.0, -1.0), (1.0, 1.0)))
    assert (given.low, given.high) == ((-1.0, -1.0), (1.0, 1.0))
    alone = controls(store, None)
    assert (alone.low, alone.high) == (tuple(recorded.min(0).tolist()), tuple(recorded.max(0).tolist()))


def test_a_press_is_what_recordings_usually_do():
    bounds = ((-1.0, -1.0), (1.0, 1.0))
    rows = [Store().actions(row) for row in range(6)]
    from_zero = np.percentile(np.abs(np.concatenate(rows)), 90, axis=0)
    from_before = np.percentile(np.abs(np.concatenate([np.diff(row, axis=0) for row in rows])), 90, axis=0)
    np.testing.assert_allclose(controls(Store("zeros"), bounds).press, from_zero, atol=1e-4)
    np.testing.assert_allclose(controls(Store("state"), bounds).press, from_before, atol=1e-4)


def test_an_action_row_is_an_array():
    np.testing.assert_array_equal(CONTROLS.check([0.5, 512]), np.array([0.5, 512], np.float32))


@pytest.mark.parametrize(
    "bad",
    [
        None, "ab", 0.5, {}, [], [0.5], [0.5, 1, 2], [0.5, "1"], [True, 1], [[0.5], [1]], [0.5, None],
        [float("nan"), 1], [0.5, float("inf")], [1.5, 1], [0.5, -1], [0.5, 10**400],
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(bad):
    with pytest.raises(ActionError, match=r"^action: expected .*, found ") as error:
        CONTROLS.check(bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
