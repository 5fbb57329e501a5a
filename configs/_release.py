"""What the recipes of the release share: its data directories under our dataset names, and one stage per run."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base

IMAGE_SIZE = 512
STAGES = ("image_decoder", "rla", "denoiser")


class Robot(NamedTuple):
    """One robot of the release: our dataset, its number, the width of its action rows (all joints), what it does."""

    dataset: str
    robot_id: str
    joints: int
    tasks: tuple[str, ...]
    play: tuple[str, ...]


ROBOTS = {
    "panda": Robot("panda", "0", 9, ("PullCube-v2", "PullCubeTool-v1"), ("pick_and_place", "tool_push", "push_only")),
    "xarm": Robot(
        "xarm6_robotiq", "1", 12, ("PegInsertionSide-v1", "PokeCube-v2"), ("pick_and_place", "tool_push", "push_only")
    ),
    "ur10e": Robot("ur10e", "2", 6, ("PushT-v2", "RollBall-v1"), ("push_only",)),
}
OUTCOMES = ("success", "fail")
PLAY_TASK = "TableOnly-v2"
IWS_TASKS = ("bimanual_box", "bimanual_rope", "bimanual_sweep", "pusht", "single_chain_in_box", "single_grasp")


def ppo(robot: str) -> tuple[str, ...]:
    """The datasets of a robot's tasks; success and fail are two, equally likely whatever their sizes."""
    return tuple(_maniskill(robot, task, group) for task in ROBOTS[robot].tasks for group in OUTCOMES)


def play(robot: str) -> tuple[str, ...]:
    """The datasets of a robot's play."""
    return tuple(_maniskill(robot, PLAY_TASK, group) for group in ROBOTS[robot].play)


def iws(task: str) -> tuple[str, ...]:
    """The dataset of a task of the interactive world simulator."""
    return (f"iws/{task}_{IMAGE_SIZE}px:episodes",)


def _maniskill(robot: str, task: str, group: str) -> str:
    split = re.sub(r"\W+", "_", f"{task}_{group}")
    return f"maniskill/{ROBOTS[robot].dataset}_{IMAGE_SIZE}px:{split}"


def dataset_references(path: str) -> tuple[str, ...]:
    """Our names of the directories of the release's data tree that a path or glob means, whatever lies before them.

    `ppo/panda/PullCube-v2/*` gives two, `data/iws_converted/pusht` one, what is not of the release none.
    """
    pieces = [_robot(piece) for piece in path.strip("/").split("/")]
    return tuple(
        reference
        for directory, reference in _directories()
        if all(map(fnmatchcase, directory, pieces[-len(directory) :])) and len(directory) <= len(pieces)
    ) or tuple(reference for task in IWS_TASKS if pieces[-1] == task for reference in iws(task))


def _robot(piece: str) -> str:
    """A robot's folder by its short name, be it called after the uid or with a suffix."""
    found = re.fullmatch(r"(panda|xarm|ur10e?).*", piece)
    return {"ur10": "ur10e"}.get(found[1], found[1]) if found else piece


def _directories() -> Iterator[tuple[tuple[str, ...], str]]:
    """The pieces of every directory of the ManiSkill tree, and what it is called here."""
    for name, robot in ROBOTS.items():
        for task in robot.tasks:
            yield from ((("ppo", name, task, group), _maniskill(name, task, group)) for group in OUTCOMES)
        yield from ((("play", name, PLAY_TASK, kind), _maniskill(name, PLAY_TASK, kind)) for kind in robot.play)


def stage(config_file: str, variant: str, variants: Iterable[str], objective: str) -> ConfigDict:
    """configs/base.py with one objective on; ValueError for a variant that `config_file` does not have."""
    if variant not in variants:
        raise ValueError(f"{config_file}: expected a variant among {', '.join(variants)}, found {variant!r}")
    config = base.get_config()
    for name in STAGES:
        config.objectives[name].enabled = name == objective
    return config


def rla(config: ConfigDict, latent: tuple[int, int], max_horizon: int, batch_size: int, accumulate: int) -> None:
    """The RLA autoencoder of a latent (tokens, width) on gaps of up to `max_horizon` frames."""
    config.rla.update({"num_tokens": latent[0], "token_dim": latent[1]})
    config.data.update({"max_horizon": max_horizon, "batch_size": batch_size})
    config.train.accumulate = accumulate


def image_decoder(config: ConfigDict) -> None:
    """32 pictures a step at a tenth of the learning rate; the published one is of step 60,000."""
    config.data.batch_size = 32
    config.train.update({"steps": 60_000, "checkpoint_every": 5_000})


def group(datasets: tuple[str, ...], *, weight: float = 1.0, min_start_frame: int = 0) -> dict[str, Any]:
    """One entry of config.data.groups."""
    return {"datasets": datasets, "weight": weight, "min_start_frame": min_start_frame}
