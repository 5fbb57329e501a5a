"""The episode contract: what one recorded trajectory is, how it is checked, and how it is stored.

Bring your own data
-------------------
An `Episode` is one continuous recording of one robot: a clip of RGB frames and, for every frame, the action that was
issued after the frame was seen. The alignment is the core of the contract, so check it first:

    frames[t]   is seen
    actions[t]  is issued, and moves the world from frames[t] to frames[t + 1]
    frames[t+1] is seen

There are as many action rows as frames; the last row has no recorded effect (repeat the previous one if you have
none). Units are yours and raw: nothing is normalised here; the world model does, with statistics of the training split.

    episode = Episode(
        frames=frames,              # uint8 [T, H, W, 3], RGB
        actions=actions,            # float32 [T, A]
        state=state,                # float32 [T, S], or None if nothing was recorded
        success=True, text="push the block to the goal",
        episode_id=0, robot_id=0, control_hz=10.0,
    )
    validate(episode, "my_video_0")  # EpisodeError in one line: name, field, expected, found, fix

Two ways to a dataset:

1. No code. One sub-folder per episode holding `video.mp4` (or `frames/*.png|jpg`) and `episode.npz` with `actions` and
   any of the other fields, then

       python -m data.build folder --source=DIR --data_dir=DIR --image_size=112

2. Your own TFDS builder: `_info` returns `features(Spec(...))`, `_generate_examples` yields
   `episode.episode_id, to_example(episode, name, spec)`. `data/simulated.py` is an example of about 100 lines.

Episode ids 0 to 9 of every split are the validation episodes, never trained on; sort or shuffle accordingly.
`effector_position` and `object_positions` are optional; with them, window starts can be biased towards interaction.
A dataset may also say how positions appear in its frames and which action holds still: data/description.py.
`foreground_mask` is optional; where it is given, the background is set to zero before the backbone sees a frame.
A dataset has an optional field in every episode or in none.

On disk one TFDS example is one episode. Each frame is its own PNG (lossless) or JPEG, handed back undecoded by
`as_data_source`, so that reading two frames decodes only two. Neither writing nor reading needs TensorFlow.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

MIN_FRAMES = 2
VALIDATION_EPISODES = 10
JPEG_QUALITY = 95


class EpisodeError(ValueError):
    """An episode breaks the contract; the message is one line: name, field, expected, found, fix."""


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One recorded trajectory; row t of every array belongs to frame t, and action t is issued after frame t is seen.

    `episode_id` counts within its split (0 to 9 are validation). Positions share one length unit, which the dataset's
    metadata names. `None` marks what the dataset does not have.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    actions: Float32[np.ndarray, "t a"]
    state: Float32[np.ndarray, "t s"] | None
    success: bool
    text: str
    episode_id: int
    robot_id: int
    control_hz: float
    foreground_mask: Bool[np.ndarray, "t h w"] | None = None
    effector_position: Float32[np.ndarray, "t d"] | None = None
    object_positions: Float32[np.ndarray, "t o d"] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What all episodes of one dataset have in common: (height, width), widths, and which optional fields exist.

    A width of `None` means that the dataset lacks the field; `num_objects` and `position_dim` describe
    `object_positions` [t, num_objects, position_dim] and `effector_position` [t, position_dim].
    """

    image_size: tuple[int, int]
    action_dim: int
    state_dim: int | None = None
    foreground_mask: bool = False
    position_dim: int | None = None
    num_objects: int | None = None

    @classmethod
    def of(cls, episode: Episode) -> "Spec":
        """The spec of a valid episode."""
        objects, effector = episode.object_positions, episode.effector_position
        return cls(
            image_size=(episode.frames.shape[1], episode.frames.shape[2]),
            action_dim=episode.actions.shape[1],
            state_dim=None if episode.state is None else episode.state.shape[1],
            foreground_mask=episode.foreground_mask is not None,
            position_dim=None if effector is None else effector.shape[1],
            num_objects=None if objects is None else objects.shape[1],
        )


def _error(name: str, field: str, expected: str, found: object, fix: str) -> EpisodeError:
    return EpisodeError(f"{name}: {field}: expected {expected}, found {found}; {fix}")


def _check_array(
    name: str,
    field: str,
    value: Any,
    dtype: type[np.generic],
    dims: tuple[str | int, ...],
    *,
    length: int | None = None,
) -> None:
    """Check dtype, rank, fixed dimensions, emptiness, row count and finiteness of one array field."""
    wanted = f"a {np.dtype(dtype).name} array [{','.join(map(str, dims))}]"
    if not isinstance(value, np.ndarray):
        raise _error(name, field, wanted, type(value).__name__, "convert it with np.asarray")
    if value.dtype != dtype:
        raise _error(name, field, wanted, f"dtype {value.dtype}", f"convert it with .astype(np.{np.dtype(dtype).name})")
    fixed = {axis: size for axis, size in enumerate(dims) if isinstance(size, int)}
    if value.ndim != len(dims) or any(value.shape[axis] != size for axis, size in fixed.items()):
        raise _error(name, field, wanted, f"shape {value.shape}", "reshape it to one row per frame")
    if length is not None and value.shape[0] != length:
        raise _error(name, field, f"{length} rows (one per frame)", f"{value.shape[0]}", "cut or pad it to the frames")
    if value.size == 0:
        raise _error(name, field, "no empty dimension", f"shape {value.shape}", "pass None for a field you do not have")
    if dtype is np.float32 and not np.isfinite(value).all():
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        raise _error(name, field, "finite values", f"{value[row].tolist()} in row {row}", "repair or drop the episode")


def _check_scalars(episode: Episode, name: str) -> None:
    if not isinstance(episode.success, bool | np.bool_):
        raise _error(name, "success", "a bool", repr(episode.success), "wrap it in bool(...)")
    if not isinstance(episode.text, str):
        raise _error(name, "text", "a str (may be empty)", repr(episode.text), "pass '' if there is none")
    for field in ("episode_id", "robot_id"):
        value = getattr(episode, field)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise _error(name, field, "an int >= 0", repr(value), "count from 0")
    hz = episode.control_hz
    if isinstance(hz, bool) or not isinstance(hz, int | float | np.floating) or not (np.isfinite(hz) and hz > 0):
        raise _error(name, "control_hz", "a finite number > 0", repr(hz), "give the action rate in Hz")


def validate(episode: Episode, name: str, spec: Spec | None = None) -> None:
    """Check an episode against the contract, and against its dataset's `spec` if given.

    `name` identifies the episode to the user (a folder, a file). Raises EpisodeError (a ValueError) with one line:
    name, field, what was expected, what was found, and the fix.
    """
    _check_array(name, "frames", episode.frames, np.uint8, ("T", "H", "W", 3))
    length, height, width = episode.frames.shape[:3]
    if length < MIN_FRAMES:
        raise _error(name, "frames", f"at least {MIN_FRAMES} frames", length, "drop the episode")
    _check_array(name, "actions", episode.actions, np.float32, ("T", "A"), length=length)
    if episode.state is not None:
        _check_array(name, "state", episode.state, np.float32, ("T", "S"), length=length)
    _check_scalars(episode, name)
    if episode.foreground_mask is not None:
        _check_array(name, "foreground_mask", episode.foreground_mask, np.bool_, ("T", height, width), length=length)
    if (episode.effector_position is None) != (episode.object_positions is None):
        lacking = "effector_position" if episode.effector_position is None else "object_positions"
        raise _error(name, lacking, "an array, since its partner is given", None, "give both positions or neither")
    if episode.effector_position is not None:
        _check_array(name, "effector_position", episode.effector_position, np.float32, ("T", "D"), length=length)
        dim = episode.effector_position.shape[1]
        if dim not in (2, 3):
            raise _error(name, "effector_position", "2 or 3 coordinates", dim, "pass the position only")
        _check_array(name, "object_positions", episode.object_positions, np.float32, ("T", "O", dim), length=length)
    if spec is not None:
        _check_spec(Spec.of(episode), spec, name)


def _check_spec(found: Spec, expected: Spec, name: str) -> None:
    for field in dataclasses.fields(Spec):
        want, have = getattr(expected, field.name), getattr(found, field.name)
        if want != have:
            fix = "all episodes of a dataset must agree"
            raise _error(name, field.name, f"{want} as in the dataset's other episodes", have, fix)


def features(spec: Spec) -> tfds.features.FeaturesDict:
    """TFDS features of a dataset; image bytes stay bytes, so that a reader chooses which frames to decode."""
    height, width = spec.image_size

    def images(kind: str) -> tfds.features.Tensor:
        doc = f"one encoded image per frame: {kind}, height {height}, width {width}"
        return tfds.features.Tensor(shape=(None,), dtype=np.object_, doc=doc)

    def rows(*shape: int) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(None, *shape), dtype=np.float32)

    tree: dict[str, tfds.features.FeatureConnector] = {
        "frames": images("RGB, PNG or JPEG"),
        "actions": rows(spec.action_dim),
        "success": tfds.features.Scalar(np.bool_),
        "text": tfds.features.Text(),
        "episode_id": tfds.features.Scalar(np.int64),
        "robot_id": tfds.features.Scalar(np.int64),
        "control_hz": tfds.features.Scalar(np.float32),
    }
    if spec.state_dim is not None:
        tree["state"] = rows(spec.state_dim)
    if spec.foreground_mask:
        tree["foreground_mask"] = images("1-bit PNG")
    if spec.position_dim is not None and spec.num_objects is not None:
        tree["effector_position"] = rows(spec.position_dim)
        tree["object_positions"] = rows(spec.num_objects, spec.position_dim)
    return tfds.features.FeaturesDict(tree)


def _encode(image: np.ndarray, codec: Literal["png", "jpeg"]) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if codec == "jpeg" else {"compress_level": 6}
    Image.fromarray(image).save(buffer, format=codec, **options)
    return buffer.getvalue()


def _encode_all(images: Iterable[np.ndarray], codec: Literal["png", "jpeg"]) -> np.ndarray:
    encoded = [_encode(image, codec) for image in images]
    out = np.empty(len(encoded), dtype=object)
    out[:] = encoded
    return out


def to_example(
    episode: Episode, name: str, spec: Spec | None = None, codec: Literal["png", "jpeg"] = "png"
) -> dict[str, Any]:
    """Validate an episode and turn it into the example that `features(Spec.of(episode))` stores."""
    validate(episode, name, spec)
    example: dict[str, Any] = {
        field.name: getattr(episode, field.name)
        for field in dataclasses.fields(Episode)
        if getattr(episode, field.name) is not None
    }
    example["frames"] = _encode_all(episode.frames, codec)
    example["success"] = bool(episode.success)
    if episode.foreground_mask is not None:
        example["foreground_mask"] = _encode_all(episode.foreground_mask, "png")
    return example


def decode_images(encoded: Iterable[bytes]) -> np.ndarray:
    """Decode images of one size: frames to uint8 [n, h, w, 3], masks to bool [n, h, w].

    Pass a slice of an example's `frames` or `foreground_mask` to decode only those.
    """
    return np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in encoded])


def from_example(example: Mapping[str, Any]) -> Episode:
    """The whole episode of a stored example, every frame decoded."""
    fields = dict(example)
    fields["frames"] = decode_images(example["frames"])
    fields["state"] = example.get("state")
    fields["success"] = bool(example["success"])
    fields["text"] = example["text"].decode() if isinstance(example["text"], bytes) else example["text"]
    if "foreground_mask" in example:
        fields["foreground_mask"] = decode_images(example["foreground_mask"])
    return Episode(**fields)
