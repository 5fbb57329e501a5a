"""Scripted motions of the arm: pushes from any side, ways around the cube, and experts for the tasks.

A motion is a generator: it reads the world and yields one action [3] per step, and ends when it is done or has failed.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from data.panda.sim import CUBE, STEP_LENGTH, World

Motion = Iterator[Float[np.ndarray, "3"]]

PUSH_HEIGHT = 0.025
CLEAR_HEIGHT = 0.13  # the closed fingers pass over the cube
STAND_OFF = CUBE / 2 + 0.055  # from the cube's centre to where a push begins
KEEP_CLEAR = 0.085  # closer than this, the closed fingers (5 cm wide) may touch a corner of the cube
GRIPPER_LOW, GRIPPER_HIGH = np.array([-0.26, -0.26, 0.02]), np.array([0.2, 0.26, 0.3])
CUBE_LOW, CUBE_HIGH = np.array([-0.17, -0.17]), np.array([0.11, 0.17])
ARRIVED = 0.012
PATIENCE = 40


def towards(world: World, target: Float[np.ndarray, "3"], speed: float) -> Float[np.ndarray, "3"]:
    """The action that moves the gripper to `target`, of length at most `speed`."""
    wanted = (np.clip(target, GRIPPER_LOW, GRIPPER_HIGH) - world.gripper) / STEP_LENGTH
    # the arm covers about half of what an action asks for
    wanted = 1.8 * wanted
    return wanted * min(1.0, speed / max(float(np.linalg.norm(wanted)), 1e-6))


def go(world: World, target: Float[np.ndarray, "3"], speed: float, patience: int = PATIENCE) -> Motion:
    """Straight to a point."""
    for _ in range(patience):
        if np.linalg.norm(np.clip(target, GRIPPER_LOW, GRIPPER_HIGH) - world.gripper) < ARRIVED:
            return
        yield towards(world, target, speed)


def go_around(world: World, target: Float[np.ndarray, "3"], speed: float) -> Motion:
    """To a point beside the cube without touching it: over it where the straight way would hit it."""
    if _blocked(world.gripper, target, world.cube):
        height = CLEAR_HEIGHT
        yield from go(world, np.array([*world.gripper[:2], height]), speed)
        yield from go(world, np.array([*target[:2], height]), speed)
    yield from go(world, target, speed)


def _blocked(
    start: Float[np.ndarray, "3"], end: Float[np.ndarray, "3"], cube: Float[np.ndarray, "3"], points: int = 12
) -> bool:
    """Whether the straight way passes the cube too closely."""
    way = start + np.linspace(0, 1, points)[:, None] * (end - start)
    near = np.linalg.norm(way[:, :2] - cube[:2], axis=1) < KEEP_CLEAR
    return bool((near & (way[:, 2] < CUBE + 0.03)).any())


def push(world: World, direction: float, length: float, speed: float, travel: float) -> Motion:
    """Stand behind the cube and push it along `direction` (radians) by about `length` metres."""
    along = np.array([np.cos(direction), np.sin(direction)])
    start = world.cube[:2] - STAND_OFF * along
    yield from go_around(world, np.array([*start, PUSH_HEIGHT]), travel)
    end = world.gripper[:2] + (length + STAND_OFF - CUBE / 2) * along
    yield from go(world, np.array([*end, PUSH_HEIGHT]), speed, patience=25)


def push_to(world: World, goal: Float[np.ndarray, "2"], speed: float, within: float) -> Motion:
    """Bring the cube to a place on the table, standing behind it again whenever the push goes astray."""
    for _ in range(8):
        way = goal - world.cube[:2]
        if np.linalg.norm(way) < within:
            return
        along = way / np.linalg.norm(way)
        yield from go_around(world, np.array([*(world.cube[:2] - STAND_OFF * along), PUSH_HEIGHT]), 0.9)
        for _ in range(PATIENCE):
            way = goal - world.cube[:2]
            left = float(np.linalg.norm(way))
            behind = world.cube[:2] - world.gripper[:2]
            aside = abs(float(along[0] * behind[1] - along[1] * behind[0]))
            if left < within or way @ along < 0 or aside > 0.022:
                break
            # aims at a point behind the cube's centre on the line to the goal, so that the push steers itself
            ahead = way / left
            aim = world.cube[:2] - ahead * (CUBE / 2 - 0.012) + ahead * min(0.03, left)
            steer = (world.cube[:2] - world.gripper[:2]) - ahead * ((world.cube[:2] - world.gripper[:2]) @ ahead)
            yield towards(world, np.array([*(aim - 1.5 * steer), PUSH_HEIGHT]), min(speed, 0.15 + 6.0 * left))
    return


def touch(world: World, speed: float) -> Motion:
    """The fingertips onto the top of the cube."""
    while True:
        aside = float(np.linalg.norm(world.gripper[:2] - world.cube[:2]))
        height = CLEAR_HEIGHT if aside > 0.03 else CUBE + 0.003
        yield towards(world, np.array([*world.cube[:2], height]), speed)
