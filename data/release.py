"""The release's names for robots, tasks and folders, and ours for them.

ppo/panda/PullCube-v2/success        ->  maniskill/panda_512px:PullCube_v2_success
play/ur10e/TableOnly-v2/push_only    ->  maniskill/ur10e_512px:TableOnly_v2_push_only
iws_converted/pusht                  ->  iws/pusht_512px:episodes
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from data.names import word

IMAGE_SIZE = 512  # of the frames that the release trains on
TREES = ("ppo", "play")
OUTCOMES = ("success", "fail")
PLAY_TASK = "TableOnly-v2"
IWS_TASKS = ("bimanual_box", "bimanual_rope", "bimanual_sweep", "pusht", "single_chain_in_box", "single_grasp")
IWS_SPLIT = "episodes"


@dataclass(frozen=True)
class Robot:
    """One robot: its name in our datasets, its id in the release, its joints, and its tasks.

    `joints` is the width of its action rows, of which the first `arm` are the arm's.
    """

    name: str
    robot_id: int
    joints: int
    arm: int
    tasks: tuple[str, ...]
    play: tuple[str, ...]


# by their folders in the release's tree
ROBOTS = {
    "panda": Robot("panda", 0, 9, 7, ("PullCube-v2", "PullCubeTool-v1"), ("pick_and_place", "tool_push", "push_only")),
    "xarm": Robot(
        "xarm6_robotiq",
        1,
        12,
        6,
        ("PegInsertionSide-v1", "PokeCube-v2"),
        ("pick_and_place", "tool_push", "push_only"),
    ),
    "ur10e": Robot("ur10e", 2, 6, 5, ("PushT-v2", "RollBall-v1"), ("push_only",)),
}


def robot_of(uid: str) -> Robot:
    """The robot for a uid or path, by the release's rule: xarm, ur10, or else panda."""
    return ROBOTS["xarm" if "xarm" in uid else "ur10e" if "ur10" in uid else "panda"]


def is_iws(pieces: Sequence[str]) -> bool:
    """Whether a folder, given as path components, belongs to the interactive world simulator's data."""
    return not (len(pieces) >= 4 and pieces[-4] in TREES)


def split_of(task: str, group: str) -> str:
    """The split of a ManiSkill folder TASK/GROUP."""
    return word(f"{task}_{group}")


def dataset_and_split(pieces: Sequence[str]) -> tuple[str, str]:
    """Our dataset (without its image size) and split for a folder given as path components."""
    if is_iws(pieces):
        return f"iws/{word(pieces[-1])}", IWS_SPLIT
    robot, task, group = pieces[-3:]
    return f"maniskill/{robot_of(robot).name}", split_of(task, group)


def ppo(robot: str) -> tuple[str, ...]:
    """The datasets of a robot's tasks; success and fail are separate, equally likely whatever their sizes."""
    return tuple(_reference("ppo", robot, task, group) for task in ROBOTS[robot].tasks for group in OUTCOMES)


def play(robot: str) -> tuple[str, ...]:
    """The datasets of a robot's play."""
    return tuple(_reference("play", robot, PLAY_TASK, group) for group in ROBOTS[robot].play)


def iws(task: str) -> tuple[str, ...]:
    """The dataset of a task of the interactive world simulator."""
    return (_reference(task),)


def dataset_references(path: str) -> tuple[str, ...]:
    """Our names for the directories of the release's data tree that a path or glob matches, whatever precedes them.

    `ppo/panda/PullCube-v2/*` gives two, `data/iws_converted/pusht` one, and anything outside the release none.
    """
    pieces = [_folder(piece) for piece in path.strip("/").split("/")]
    return tuple(
        _reference(*directory)
        for directory in _directories()
        if all(map(fnmatchcase, directory, pieces[-len(directory) :])) and len(directory) <= len(pieces)
    ) or tuple(reference for task in IWS_TASKS if pieces[-1] == task for reference in iws(task))


def _reference(*pieces: str) -> str:
    dataset, split = dataset_and_split(pieces)
    return f"{dataset}_{IMAGE_SIZE}px:{split}"


def _folder(piece: str) -> str:
    """A robot's folder by its short name, whether it is named after the uid or has a suffix."""
    match = re.fullmatch(r"(panda|xarm|ur10e?).*", piece)
    return {"ur10": "ur10e"}.get(match[1], match[1]) if match else piece


def _directories() -> Iterator[tuple[str, ...]]:
    """The path components of every directory of the ManiSkill tree."""
    for name, robot in ROBOTS.items():
        yield from (("ppo", name, task, group) for task in robot.tasks for group in OUTCOMES)
        yield from (("play", name, PLAY_TASK, group) for group in robot.play)
