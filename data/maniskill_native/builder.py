"""ManiSkill's native trajectory files recorded with RGB frames: one dataset per file, with one split `episodes`.

    SOURCE/.../PullCube-v1/.../trajectory.rgb.pd_joint_pos.physx_cpu.h5 and .json
        ->  maniskill_native/PullCube_v1_rgb_pd_joint_pos_physx_cpu_512px:episodes

SOURCE is such a file or a folder of them. An episode of T actions has T + 1 observations; its last action row repeats
the one before, as nothing follows it. Actions are those of the file's controller, raw. Episodes are numbered as in the
file; 0 to 9 are validation.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data import hdf5
from data.names import word
from data.recordings import Layout, Recording, RecordingsBuilder, common
from data.release import robot_of
from data.schema import Episode, EpisodeError, Spec
from data.video import frames_array

CONTROL_HZ = 20.0  # ManiSkill's default
SPLIT = "episodes"
READ_AHEAD = 16  # frames: compressed chunks hold several
SCENERY = ("table", "ground", "robot", "workspace", "goal", "camera")  # actors that are never pushed


@dataclass(frozen=True)
class NativeRecording(Recording):
    """An episode: its group in the h5 file and whether it succeeded (None: the file's arrays say)."""

    group: str
    success: bool | None


@dataclass(frozen=True)
class Contents:
    """What the first readable episode has; all others must have the same."""

    action_dim: int
    state_dim: int | None
    objects: tuple[str, ...]


@dataclass(frozen=True)
class NativeLayout(Layout):
    """One trajectory file seen through one camera."""

    path: Path
    name: str
    camera: str
    robot_id: int
    control_hz: float
    objects: tuple[str, ...]
    spec: Spec
    metadata: dict[str, Any] = field(repr=False)

    def recordings(self) -> list[Recording]:
        """The episodes that the .json lists."""
        return [
            NativeRecording(SPLIT, index, f"{self.path} traj_{index}", (self.path,), f"traj_{index}", success)
            for index, success in _read_json(self.path).episodes.items()
        ]

    def read(self, recording: Recording) -> tuple[Episode, str]:
        """One episode: T + 1 frames, and T actions with the last one repeated."""
        assert isinstance(recording, NativeRecording)
        with hdf5.open_file(self.path) as file:
            group = _group(file, recording.group)
            actions = _array(group, "actions", 2)
            frames = frames_array(_rgb_frames(group, self.camera), self.spec.image_size[0])
            state = None if self.spec.state_dim is None else _array(group, "obs/agent/qpos", 2)
            effector, objects = None, None
            if self.objects:
                effector = np.ascontiguousarray(_array(group, "obs/extra/tcp_pose", 2)[:, :3])
                poses = [_array(group, f"env_states/actors/{name}", 2)[:, :3] for name in self.objects]
                objects = np.stack(poses, axis=1)
            success = recording.success
            if success is None:
                flags = hdf5.numbers(group, "success")
                success = flags is not None and bool(flags.any())
        if not len(actions) or len(frames) != len(actions) + 1:
            counts = f"{len(frames)} frames for {len(actions)} actions"
            raise EpisodeError(
                f"{recording.name}: expected one more frame than actions, found {counts}; record it again"
            )
        episode = Episode(
            frames=frames,
            actions=np.concatenate([actions, actions[-1:]]),
            state=state,
            success=success,
            text="",
            episode_id=recording.episode_id,
            robot_id=self.robot_id,
            control_hz=self.control_hz,
            effector_position=effector,
            object_positions=objects,
        )
        return episode, ""


def _rgb_frames(group: h5py.Group, camera: str) -> Iterator[Image.Image]:
    """RGB frames, read from disk a few at a time."""
    key = f"obs/sensor_data/{camera}/rgb"
    rgb = hdf5.dataset(group, key)
    if rgb is None or rgb.dtype != np.uint8 or rgb.ndim != 4 or rgb.shape[3] not in (3, 4):
        actual = "none" if rgb is None else f"{rgb.dtype} {rgb.shape}"
        where = f"{group.file.filename}: {group.name}/{key}"
        raise EpisodeError(f"{where}: expected uint8 [t,h,w,3], found {actual}; replay the trajectories with -o rgb")
    for first in range(0, len(rgb), READ_AHEAD):
        yield from map(Image.fromarray, rgb[first : first + READ_AHEAD][..., :3])


def _array(group: h5py.Group, key: str, dims: int) -> np.ndarray:
    array = hdf5.numbers(group, key)
    if array is None or array.ndim != dims:
        actual = "none" if array is None else f"shape {array.shape}"
        where = f"{group.file.filename}: {group.name}/{key}"
        raise EpisodeError(f"{where}: expected an array of {dims} dimensions, found {actual}; record it again")
    return array


def _group(file: h5py.File, name: str) -> h5py.Group:
    group = hdf5.find(file, name)
    if not isinstance(group, h5py.Group):
        raise EpisodeError(f"{file.filename}: expected the episode {name}, found none; record it again")
    return group


@dataclass(frozen=True)
class Description:
    """The .json beside a trajectory file: its environment, and success by episode id (None: unknown)."""

    env_id: str
    robot_uid: str
    control_mode: str
    control_hz: float
    episodes: dict[int, bool | None]


def _read_json(path: Path) -> Description:
    where = path.with_suffix(".json")
    try:
        described = json.loads(where.read_text())
        env, entries = described["env_info"], described["episodes"]
        kwargs = env.get("env_kwargs") or {}
        success = {int(entry["episode_id"]): entry.get("success") for entry in entries}
        if not success or len(success) < len(entries):
            raise ValueError(f"{len(entries)} episodes of {len(success)} ids")
        return Description(
            env_id=str(env["env_id"]),
            robot_uid=str(kwargs.get("robot_uids", "panda")),
            control_mode=str(kwargs.get("control_mode", "unknown")),
            control_hz=float((kwargs.get("sim_config") or {}).get("control_freq", CONTROL_HZ)),
            episodes={index: None if success[index] is None else bool(success[index]) for index in sorted(success)},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        wanted = "the episodes and env_info of the h5 file"
        raise EpisodeError(f"{where}: expected {wanted}, found {reason}; restore it") from error


def layouts(source: Path, image_size: int, camera: str | None = None) -> list[NativeLayout]:
    """One layout per trajectory file; EpisodeError if there is none or if two would get the same name."""
    paths = [source] if source.is_file() else sorted(source.rglob("*.h5"))
    paths = [path for path in paths if path.with_suffix(".json").is_file()]
    if not paths:
        raise EpisodeError(f"{source}: expected a trajectory .h5 file with its .json, found none; correct --source")
    cameras = {path: names for path in paths if (names := _cameras(path))}
    if not cameras:
        names = ", ".join(path.name for path in paths)
        raise EpisodeError(f"{source}: expected a file with obs/sensor_data, found {names}; replay them with -o rgb")
    per_file = [_layout(path, image_size, _choose(path, cameras[path], camera)) for path in cameras]
    for layout in per_file:
        if (other := next(one for one in per_file if one.name == layout.name)) is not layout:
            raise EpisodeError(
                f"{layout.path}: expected one file of its name, found {other.path} too; name one of them"
            )
    return per_file


def _layout(path: Path, image_size: int, camera: str) -> NativeLayout:
    described = _read_json(path)
    with hdf5.open_file(path) as file:
        shared = common(contents for group in _groups(file) if (contents := _contents(group)))
    if shared is None:
        raise EpisodeError(f"{path}: expected episodes with actions and RGB frames, found none; replay with -o rgb")
    spec = Spec(
        image_size=(image_size, image_size),
        action_dim=shared.action_dim,
        state_dim=shared.state_dim,
        position_dim=3 if shared.objects else None,
        num_objects=len(shared.objects) or None,
    )
    robot = robot_of(described.robot_uid)
    name = word(f"{described.env_id}_{path.stem.removeprefix('trajectory.')}")
    metadata = {
        "length_unit": "metres",
        "actions": f"{described.control_mode}, raw",
        "control_hz": described.control_hz,
        "camera": camera,
        "robot": robot.name,
        "objects": ", ".join(shared.objects),
    }
    return NativeLayout(path, name, camera, robot.robot_id, described.control_hz, shared.objects, spec, metadata)


def _groups(file: h5py.File) -> list[h5py.Group]:
    return [group for name in file if isinstance(group := hdf5.find(file, str(name)), h5py.Group)]


def _cameras(path: Path) -> list[str]:
    """The cameras of the first episode that has any; none in a file recorded without observations."""
    with hdf5.open_file(path) as file:
        sensors = (hdf5.find(group, "obs/sensor_data") for group in _groups(file))
        return next((sorted(map(str, data)) for data in sensors if isinstance(data, h5py.Group) and len(data)), [])


def _choose(path: Path, cameras: list[str], wanted: str | None) -> str:
    if wanted in cameras or (wanted is None and len(cameras) == 1):
        return wanted or cameras[0]
    raise EpisodeError(f"{path}: --camera: expected one of {', '.join(cameras)}, found {wanted}; name one")


def _contents(group: h5py.Group) -> Contents | None:
    try:
        actions, qpos = hdf5.dataset(group, "actions"), hdf5.dataset(group, "obs/agent/qpos")
        tcp, actors = hdf5.dataset(group, "obs/extra/tcp_pose"), hdf5.find(group, "env_states/actors")
    except EpisodeError:
        return None
    if actions is None:
        return None
    names = sorted(actors) if isinstance(actors, h5py.Group) and tcp is not None else []
    objects = tuple(name for name in names if not any(word in name.lower() for word in SCENERY))
    return Contents(actions.shape[-1], None if qpos is None else qpos.shape[-1], objects)


class ManiSkillNativeBuilder(RecordingsBuilder):
    """One of ManiSkill's native trajectory files; actions are those of its controller, raw."""

    name = "maniskill_native"
    VERSION = tfds.core.Version("1.0.0")
