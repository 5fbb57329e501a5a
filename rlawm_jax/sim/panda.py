"""The arm from panda-gym, one simulator per task; starts are drawn as for the demonstrations (data/panda/tasks.py)."""

import numpy as np
from jaxtyping import Float, UInt8

from data.panda.sim import CONTROL_HZ, World, versions
from data.panda.tasks import REACH, TASKS, start
from rlawm_jax.sim.protocol import Task

MAX_STEPS = {"touch": 60, "push": 100, "mark": 100}
LOOSE = 2.0  # success is also counted at this many times the distance


def task(name: str) -> Task:
    """The protocol's description of a task of `data.panda.tasks.TASKS`."""
    within = TASKS[name].success_within
    return Task(
        simulator=f"panda_{name}",
        action_low=(-1.0, -1.0, -1.0),
        action_high=(1.0, 1.0, 1.0),
        control_hz=CONTROL_HZ,
        max_steps=MAX_STEPS[name],
        score=f"closeness, 1 - distance / {REACH} m",
        success_above=1.0 - within / REACH,
        levels=(1.0 - LOOSE * within / REACH,),
        starts="starts drawn as the demonstrations' were, none of them reused; gripper, cube and its angle uniform",
        versions=versions(),
    )


class PandaSimulator:
    """One table of the arm; actions are displacements of the gripper in units of 5 cm, each in [-1, 1]."""

    def __init__(self, image_size: int, name: str) -> None:
        self._world, self._task = World(image_size), TASKS[name]
        self.task = task(name)

    def start(self, seed: int) -> Float[np.ndarray, "9"]:
        """The state that an episode starts from."""
        return start(np.random.default_rng(seed), self._task)

    def reset(self, seed: int) -> None:
        """Start a new episode at rest."""
        self._world.reset(self.start(seed))

    def step(self, action: Float[np.ndarray, "3"]) -> None:
        """Ask for a displacement of the gripper and let 0.04 s pass."""
        self._world.step(np.clip(action, -1.0, 1.0))

    def hold(self) -> Float[np.ndarray, "3"]:
        """No displacement."""
        return np.zeros(3)

    def score(self) -> float:
        """1 at the goal, 0 at `REACH` metres and beyond."""
        return max(0.0, 1.0 - self._task.distance(self._world) / REACH)

    def replay(self, state: Float[np.ndarray, "9"], actions: Float[np.ndarray, "t 3"]) -> None:
        """Start in a recorded state, at rest, and execute actions."""
        self._world.reset(state)
        for action in actions:
            self.step(action)

    def positions(self) -> Float[np.ndarray, "2 3"]:
        """Gripper and cube, in metres."""
        return np.stack([self._world.gripper, self._world.cube])

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The frame as the dataset would hold it for this state."""
        return self._world.render()
