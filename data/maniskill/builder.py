"""The release's ManiSkill data: one dataset per robot, one split per dataset folder of the release.

    SOURCE/ppo/panda/PullCube-v2/success/traj_000000/...    ->  maniskill/panda_512px:PullCube_v2_success
    SOURCE/play/ur10e/TableOnly-v2/push_only/...            ->  maniskill/ur10e_512px:TableOnly_v2_push_only

SOURCE may be any part of that tree. Episode ids (0 to 9 are validation) and robot ids (panda 0, xarm 1, ur10e 2)
are the release's. Actions are the controller targets expanded to all joints, as the released world models take them.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from data.maniskill.robots import full_qpos
from data.maniskill.trajectory import TrajectoryReader, dataset_folders, read_header, recordings_of
from data.recordings import Layout, Recording, RecordingsBuilder, common
from data.release import Robot, robot_of, split_of
from data.schema import Episode, EpisodeError, Spec

CAMERA = "front_lower_camera"
CONTROL_HZ = 20.0  # the videos' headers say 30


@dataclass(frozen=True)
class ManiSkillLayout(Layout):
    """The dataset folders of one robot."""

    robot: Robot
    folders: tuple[Path, ...]
    reader: TrajectoryReader
    spec: Spec
    metadata: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The robot."""
        return self.robot.name

    def recordings(self) -> list[Recording]:
        """The trajectories of every folder, one split per folder."""
        return [recording for folder in self.folders for recording in recordings_of(folder, split_name(folder))]

    def read(self, recording: Recording) -> tuple[Episode, str]:
        """One trajectory; the folder's name says whether it succeeded where the file does not."""
        folder = Path(recording.name)
        return self.reader.read(recording, folder, success=folder.parent.name == "success")


def split_name(folder: Path) -> str:
    """TASK_GROUP of .../TASK/GROUP, in letters, digits and underscores."""
    folder = folder.resolve()
    return split_of(folder.parent.name, folder.name)


def _robot(folder: Path) -> Robot:
    """By the uid in metadata.json, else by the path."""
    uids = []
    try:
        infos = json.loads((folder / "metadata.json").read_text())["robot_infos"]
        uids = [str(info["uid"]) for info in infos]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: the path names the robot too
    return robot_of(uids[0] if uids else str(folder))


def layouts(source: Path, image_size: int, camera: str | None = None) -> list[ManiSkillLayout]:
    """One layout per robot in the tree; EpisodeError if two folders would give the same split."""
    by_robot: dict[Robot, list[Path]] = {}
    for folder in dataset_folders(source):
        by_robot.setdefault(_robot(folder), []).append(folder)
    return [_layout(robot, folders, image_size, camera or CAMERA) for robot, folders in by_robot.items()]


def _layout(robot: Robot, folders: list[Path], image_size: int, camera: str) -> ManiSkillLayout:
    splits: dict[str, Path] = {}
    for folder in folders:
        if (other := splits.setdefault(split_name(folder), folder)) != folder:
            raise EpisodeError(f"{folder}: expected one folder of its task and group, found {other} too; name a part")
    paths = [Path(recording.name) for folder in folders for recording in recordings_of(folder, "")]
    headers = [header for path in paths if (header := read_header(path, camera))]
    masks = bool(common(header.masks for header in headers))
    states = common(header.state_dim for header in headers) is not None
    objects = max((header.objects for header in headers), default=0) or None
    spec = Spec(
        image_size=(image_size, image_size),
        action_dim=robot.joints,
        state_dim=robot.joints if states else None,
        foreground_mask=masks,
        position_dim=3 if objects else None,
        num_objects=objects,
    )
    reader = TrajectoryReader(
        camera=camera,
        image_size=image_size,
        robot_id=robot.robot_id,
        control_hz=CONTROL_HZ,
        masks=masks,
        state=states,
        num_objects=objects,
        actions=partial(full_qpos, robot),
    )
    metadata = {
        "length_unit": "metres",
        "object_positions": "centres of the actors; where a trajectory has fewer, the rest lie still in the origin",
        "actions": "target positions of all joints, radians and metres, raw",
        **({"hold_still": "state"} if states else {}),
        "control_hz": CONTROL_HZ,
        "camera": camera,
        "robot": robot.name,
        "image_size": image_size,
    }
    return ManiSkillLayout(robot, tuple(folders), reader, spec, metadata)


class ManiSkillBuilder(RecordingsBuilder):
    """The release's ManiSkill data of one robot; actions and state are all joints, positions in metres."""

    name = "maniskill"
    VERSION = tfds.core.Version("1.0.0")
