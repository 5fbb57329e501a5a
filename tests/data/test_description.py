"""Positions land where they are seen, in flat and in perspective cameras; a wrong declaration is refused."""

import json

import numpy as np
import pytest

from data.description import Projection, from_clip, read_description
from data.episodes import EpisodeStore
from tests.data.conftest import write_labelled

FLAT = {"matrix": np.eye(3).tolist(), "effector_radius": 0.0, "object_radius": 0.0}


def describe(root, **keys):
    """Add keys to the metadata of the dataset `one`."""
    for info in root.glob("one/**/dataset_info.json"):
        (info.parent / "metadata.json").write_text(json.dumps(keys))


@pytest.fixture
def root(tmp_path):
    write_labelled(tmp_path, "one")
    return tmp_path


def test_a_flat_camera_marks_the_patches_that_hold_the_effector_and_the_objects():
    camera = Projection(np.eye(3), 0.0, 0.0)
    found = camera.near(np.array([[0.9, 0.1]]), np.array([[[0.1, 0.6], [5.0, 0.5]]]), (2, 4)).reshape(2, 4)
    expected = np.zeros((2, 4), bool)
    expected[0, 3] = expected[1, 0] = True  # the second object is outside the frame
    np.testing.assert_array_equal(found, expected)


def test_a_radius_reaches_into_neighbouring_patches_and_may_differ_by_object():
    position = np.array([[[0.125, 0.125], [0.875, 0.875]]])
    found = Projection(np.eye(3), 0.0, (0.13, 0.0)).near(np.array([[0.125, 0.125]]), position, (4, 4)).reshape(4, 4)
    expected = np.zeros((4, 4), bool)
    expected[0, :2] = expected[1, 0] = expected[3, 3] = True  # the corner neighbour is 0.18 away
    np.testing.assert_array_equal(found, expected)


def test_a_perspective_camera_divides_by_depth_and_sees_nothing_behind_it():
    # OpenGL: the camera at the origin looks along -z, 90 degrees wide
    clip = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, -0.2], [0, 0, -1, 0]])
    camera = Projection(from_clip(clip), 0.1, 0.1)
    np.testing.assert_allclose(camera.place(np.array([1.0, 0.0, -2.0])), [0.75, 0.5])
    np.testing.assert_allclose(camera.place(np.array([0.0, 2.0, -4.0])), [0.5, 0.25])  # up is a smaller y
    behind = np.array([[0.0, 0.0, 1.0]])
    assert np.isnan(camera.place(behind)).all()
    assert not camera.near(behind, behind[:, None], (4, 4)).any()


def test_a_dataset_that_says_nothing_loads_and_knows_no_moving_patch_and_no_way_to_hold_still(root):
    store = EpisodeStore(root, "one:play")
    assert store.hold_still(0, 3) is None
    assert not store.near_patches(0, [0, 5], (2, 2)).any()


def test_what_is_added_to_the_metadata_of_a_built_dataset_is_read(root):
    digest = EpisodeStore(root, "one:play").digest
    describe(root, projection=FLAT, hold_still="zeros")
    store = EpisodeStore(root, "one:play")
    assert store.digest == digest  # token caches stay valid
    np.testing.assert_array_equal(store.hold_still(0, 3), np.zeros(2))
    # effector and object in the frame's corner; at frame 5 the object is at 0.1
    found = store.near_patches(0, [0, 5], (11, 11)).reshape(2, 11, 11)
    assert [np.argwhere(frame).tolist() for frame in found] == [[[0, 0]], [[0, 0], [1, 1]]]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hold_still": "stay"}, "hold_still: expected one of state, zeros, found 'stay'"),
        ({"projection": {"matrix": [[1]]}}, "projection: expected matrix, effector_radius, object_radius as numbers"),
        (
            {"projection": FLAT | {"matrix": np.eye(4).tolist()}},
            r"matrix: expected 3 rows of 3 finite numbers.*\(4, 4\)",
        ),
    ],
)
def test_a_wrong_declaration_is_refused_in_one_line(root, keys, words):
    describe(root, **keys)
    with pytest.raises(ValueError, match=words) as error:
        EpisodeStore(root, "one:play")
    assert "metadata.json" in str(error.value) and "\n" not in str(error.value)


def test_a_projection_without_positions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a dataset with positions, found none"):
        read_description({"projection": FLAT}, tmp_path, {"actions": 2})


def test_states_hold_still_only_where_there_are_states(root):
    describe(root, hold_still="state")
    with pytest.raises(ValueError, match="hold_still: expected a dataset with a state of 2 or more columns"):
        EpisodeStore(root, "one:play")
