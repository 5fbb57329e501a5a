"""The tasks of the arm: touch the cube, push it to a fixed spot, push it to a mark that differs by episode."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from data.panda import motion
from data.panda.sim import CUBE, NO_MARK, World

FIXED_SPOT = np.array([-0.02, 0.0])
REACH = 0.25  # metres at which the closeness of a task is 0
NEAR = 0.025  # metres within which a push has succeeded
TOUCHING = 0.05  # metres between gripper and cube centre: the fingertips are on the cube
# where cubes start; far enough from the goal that the task takes a push
CUBES = np.array([-0.13, -0.14]), np.array([0.09, 0.14])
MARKS = np.array([-0.1, -0.1]), np.array([0.07, 0.1])
APART = 0.09
GRIPPERS = np.array([-0.2, -0.2, 0.04]), np.array([0.12, 0.2, 0.22])


@dataclasses.dataclass(frozen=True)
class Task:
    """Where episodes start, how far one is from success in metres, and the expert's motion."""

    text: str
    success_within: float
    fixed: bool  # the goal is the same in all episodes
    expert: Callable[[World, float], motion.Motion]
    distance: Callable[[World], float]


def push_goal(world: World) -> Float[np.ndarray, "2"]:
    """The mark, where there is one, else the fixed spot."""
    return world.mark if np.abs(world.mark).max() < NO_MARK[0] else FIXED_SPOT


def _push(world: World, speed: float) -> motion.Motion:
    return motion.push_to(world, push_goal(world), speed, within=0.7 * NEAR)


def _cube_to_goal(world: World) -> float:
    return float(np.linalg.norm(world.cube[:2] - push_goal(world)))


def _gripper_to_cube(world: World) -> float:
    return float(np.linalg.norm(world.gripper - world.cube))


TASKS = {
    "touch": Task("touch the cube", TOUCHING, True, motion.touch, _gripper_to_cube),
    "push": Task("push the cube to the middle of the table", NEAR, True, _push, _cube_to_goal),
    "mark": Task("push the cube onto the red mark", NEAR, False, _push, _cube_to_goal),
}


def start(rng: np.random.Generator, task: Task | None = None) -> Float[np.ndarray, "9"]:
    """A random start: gripper clear of the cube; with a task, the cube also clear of its goal."""
    while True:
        gripper, cube = rng.uniform(*GRIPPERS), rng.uniform(*CUBES)
        mark = np.array(NO_MARK) if task is None or task.fixed else rng.uniform(*MARKS)
        goal = None if task is None else FIXED_SPOT if task.fixed else mark
        clear = np.linalg.norm(gripper[:2] - cube) > APART
        if clear and (goal is None or np.linalg.norm(goal - cube) > APART):
            return np.array([*gripper, *cube, CUBE / 2, rng.uniform(-np.pi / 4, np.pi / 4), *mark])
