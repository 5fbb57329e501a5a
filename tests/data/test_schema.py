import dataclasses

import numpy as np
import pytest

from data import schema

T, H, W = 5, 12, 16


def make_episode(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "frames": rng.integers(0, 256, (T, H, W, 3), dtype=np.uint8),
        "actions": rng.normal(size=(T, 2)).astype(np.float32),
        "state": rng.normal(size=(T, 3)).astype(np.float32),
        "success": True,
        "text": "",
        "episode_id": 3,
        "robot_id": 1,
        "control_hz": 10.0,
        "foreground_mask": rng.uniform(size=(T, H, W)) > 0.5,
        "effector_position": rng.normal(size=(T, 2)).astype(np.float32),
        "object_positions": rng.normal(size=(T, 1, 2)).astype(np.float32),
    }
    return schema.Episode(**fields | changes)


def store_and_load(episode, codec="png"):
    """Through the serialised record, as a dataset's reader sees it."""
    features = schema.features(schema.Spec.of(episode))
    record = features.serialize_example(features.encode_example(schema.to_example(episode, "episode", codec=codec)))
    return features.deserialize_example_np(record)


def spoilt(array, row, value):
    array = array.copy()
    array[row] = value
    return array


GOOD = make_episode()
BROKEN = [
    ({"frames": GOOD.frames.astype(np.float32)}, "frames: expected a uint8 array [T,H,W,3], found dtype float32; "),
    ({"frames": GOOD.frames[..., :1]}, "frames: expected a uint8 array [T,H,W,3], found shape (5, 12, 16, 1); "),
    ({"frames": GOOD.frames.tolist()}, "frames: expected a uint8 array [T,H,W,3], found list; "),
    ({"frames": GOOD.frames[:1]}, "frames: expected at least 2 frames, found 1; drop the episode"),
    ({"actions": GOOD.actions[:-1]}, "actions: expected 5 rows (one per frame), found 4; cut or pad it to the frames"),
    ({"actions": GOOD.actions.astype(np.float64)}, "actions: expected a float32 array [T,A], found dtype float64; "),
    ({"actions": GOOD.actions[:, 0]}, "actions: expected a float32 array [T,A], found shape (5,); "),
    ({"actions": GOOD.actions[:, :0]}, "actions: expected no empty dimension, found shape (5, 0); "),
    (
        {"actions": spoilt(GOOD.actions, 2, (1.0, np.nan))},
        "actions: expected finite values, found [1.0, nan] in row 2; ",
    ),
    ({"state": spoilt(GOOD.state, 4, np.inf)}, "state: expected finite values, found [inf, inf, inf] in row 4; "),
    ({"state": GOOD.state[1:]}, "state: expected 5 rows (one per frame), found 4; "),
    ({"success": 1.0}, "success: expected a bool, found 1.0; wrap it in bool(...)"),
    ({"text": None}, "text: expected a str (may be empty), found None; pass '' if there is none"),
    ({"episode_id": -1}, "episode_id: expected an int >= 0, found -1; count from 0"),
    ({"robot_id": True}, "robot_id: expected an int >= 0, found True; count from 0"),
    ({"control_hz": 0.0}, "control_hz: expected a finite number > 0, found 0.0; "),
    ({"control_hz": float("nan")}, "control_hz: expected a finite number > 0, found nan; "),
    ({"foreground_mask": GOOD.foreground_mask[:, :4]}, "foreground_mask: expected a bool array [T,12,16], found shape"),
    ({"foreground_mask": GOOD.frames[..., 0]}, "foreground_mask: expected a bool array [T,12,16], found dtype uint8; "),
    ({"object_positions": None}, "object_positions: expected an array, since its partner is given, found None; "),
    ({"effector_position": None}, "effector_position: expected an array, since its partner is given, found None; "),
    (
        {"effector_position": np.zeros((T, 4), np.float32)},
        "effector_position: expected 2 or 3 coordinates, found 4; pass the position only",
    ),
    (
        {"object_positions": np.zeros((T, 1, 3), np.float32)},
        "object_positions: expected a float32 array [T,O,2], found shape (5, 1, 3); ",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), BROKEN, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(BROKEN)]
)
def test_broken_field_gives_one_line_with_name_field_expected_found_and_fix(changes, message):
    with pytest.raises(schema.EpisodeError) as error:
        schema.validate(make_episode(**changes), "my_video_7")
    text = str(error.value)
    assert text.startswith("my_video_7: " + message)
    assert "\n" not in text
    assert text.rpartition("; ")[2]


def test_the_minimal_episode_is_valid():
    least = make_episode(state=None, foreground_mask=None, effector_position=None, object_positions=None)
    schema.validate(least, "least")
    schema.validate(make_episode(success=np.bool_(False), episode_id=np.int64(0), control_hz=np.float32(30)), "numpy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"actions": np.zeros((T, 7), np.float32)},
            "action_dim: expected 2 as in the dataset's other episodes, found 7; ",
        ),
        ({"state": None}, "state_dim: expected 3 as in the dataset's other episodes, found None; "),
        ({"foreground_mask": None}, "foreground_mask: expected True as in the dataset's other episodes, found False; "),
    ],
)
def test_an_episode_that_differs_from_its_dataset_is_refused(changes, message):
    with pytest.raises(schema.EpisodeError) as error:
        schema.validate(make_episode(**changes), "odd", schema.Spec.of(GOOD))
    assert str(error.value).startswith("odd: " + message)


@pytest.mark.parametrize("optional", [True, False])
def test_a_stored_episode_comes_back_exactly(optional):
    changes = {} if optional else dict.fromkeys(("state", "foreground_mask", "effector_position", "object_positions"))
    episode = make_episode(**changes)
    loaded = schema.from_example(store_and_load(episode))
    for field in dataclasses.fields(schema.Episode):
        before, after = getattr(episode, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(before, after, err_msg=field.name)
        assert getattr(before, "dtype", type(before)) == getattr(after, "dtype", type(after)), field.name


def test_a_reader_can_decode_chosen_frames_alone():
    example = store_and_load(GOOD)
    example["frames"][0] = b"not an image"
    np.testing.assert_array_equal(schema.decode_images(example["frames"][[1, 4]]), GOOD.frames[[1, 4]])
    np.testing.assert_array_equal(schema.decode_images(example["foreground_mask"][2:3]), GOOD.foreground_mask[2:3])


def test_jpeg_is_close_and_smaller_than_png_on_a_smooth_frame():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    noise = np.random.default_rng(0).integers(-4, 5, (2, 64, 64, 3))
    frames = np.clip(np.broadcast_to(ramp[:, None, None], (2, 64, 64, 3)) + noise, 0, 255).astype(np.uint8)
    episode = make_episode(
        frames=frames, actions=GOOD.actions[:2], state=None, foreground_mask=None, effector_position=None,
        object_positions=None,
    )  # fmt: skip
    jpeg, png = store_and_load(episode, "jpeg"), store_and_load(episode, "png")
    assert sum(map(len, jpeg["frames"])) < sum(map(len, png["frames"]))
    # Noise of up to 4 grey values per channel, of which quality 95 keeps the luminance: the mean stays within that.
    assert np.abs(schema.decode_images(jpeg["frames"]).astype(int) - frames).mean() < 4
