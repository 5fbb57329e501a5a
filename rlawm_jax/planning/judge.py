"""Plans judged in the true simulator: distances to the goal's positions after every step, beside the floors.

Floors: standing still and random actions; roof: the recorded actions. All start in the same states.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from rlawm_jax.planning.goals import Problem
from rlawm_jax.planning.planner import Planner
from rlawm_jax.sim.protocol import Simulator

Progress = Callable[[int], Any]


@dataclass(frozen=True, eq=False)
class Judged:
    """Distances [n, steps + 1, p] of effector and objects to their places in the goal, from the start on."""

    method: str
    distances: Float[np.ndarray, "n t p"]
    seconds_per_plan: float | None = None

    @property
    def final(self) -> Float[np.ndarray, "n p"]:
        """After the last step."""
        return self.distances[:, -1]

    @property
    def best(self) -> Float[np.ndarray, "n p"]:
        """At the step that was closest."""
        return self.distances.min(axis=1)


# (worlds in their current state, steps done) -> rows to execute
Choose = Callable[[Sequence[Simulator], int], Float[np.ndarray, "n h a"]]


def replayed(problem: Problem, world: Simulator) -> Problem:
    """The problem with start and goal as the simulator replays them.

    A recording's first state is rounded: after contacts, a replay can be centimetres off what was recorded, and the
    recorded actions would not reach the goal.
    """
    world.replay(problem.first_state, problem.actions[: problem.frame])
    start = world.positions()
    for action in problem.recorded():
        world.step(action)
    return replace(problem, start_positions=start, goal_positions=world.positions(), goal_frame=world.render())


def run(
    method: str,
    choose: Choose,
    worlds: Sequence[Simulator],
    problems: Sequence[Problem],
    steps: int,
    watch: Callable[[int], Any] = lambda step: None,
) -> Judged:
    """Start every world in its problem's state and execute the chosen rows until `steps` are done.

    `watch` is called at the start and after every step, with the number of steps done.
    """
    for world, problem in zip(worlds, problems, strict=True):
        world.replay(problem.first_state, problem.actions[: problem.frame])
    goals = np.stack([problem.goal_positions for problem in problems])

    def measure() -> np.ndarray:
        return np.linalg.norm(np.stack([world.positions() for world in worlds]) - goals, axis=-1)

    distances = [measure()]
    watch(0)
    while len(distances) <= steps:
        chunks = choose(worlds, len(distances) - 1)
        for row in range(min(chunks.shape[1], steps - len(distances) + 1)):
            for world, chunk in zip(worlds, chunks, strict=True):
                world.step(chunk[row])
            distances.append(measure())
            watch(len(distances) - 1)
    return Judged(method, np.stack(distances, axis=1))


class Films:
    """Frames of the first worlds, each beside its goal: `films.watch` is for `run`."""

    def __init__(self, worlds: Sequence[Simulator], problems: Sequence[Problem], count: int) -> None:
        self._filmed = list(zip(worlds, problems, strict=True))[:count]
        self.frames: list[list[UInt8[np.ndarray, "h w 3"]]] = [[] for _ in self._filmed]

    def watch(self, step: int) -> None:
        """Add a frame to every film."""
        for frames, (world, problem) in zip(self.frames, self._filmed, strict=True):
            frames.append(np.concatenate([world.render(), problem.goal_frame], axis=1))


class Replanning:
    """Receding horizon: plan to the goal, execute the first `execute` rows, look again and plan the rest."""

    def __init__(
        self, planner: Planner, problems: Sequence[Problem], *, execute: int, progress: Progress = lambda plans: None
    ) -> None:
        self.planner, self.execute, self.progress = planner, execute, progress
        self._goals = planner.encode(np.stack([problem.goal_frame for problem in problems]))
        self._ahead = problems[0].ahead
        self._left: np.ndarray | None = None
        self.seconds, self.plans = 0.0, 0

    def __call__(self, worlds: Sequence[Simulator], done: int) -> Float[np.ndarray, "n h a"]:
        """The first rows of a new plan for every world."""
        frames = np.stack([world.render() for world in worlds])
        begin = time.perf_counter()
        rows = self._ahead - done
        start = self.planner.encode(frames)
        plan = self.planner.plan(start, self._goals, rows, turn=done, previous=self._left)
        self.seconds += time.perf_counter() - begin
        self.plans += len(worlds)
        self.progress(len(worlds))
        self._left = plan[:, self.execute :]
        return plan[:, : self.execute]


def still(worlds: Sequence[Simulator], done: int) -> Float[np.ndarray, "n h a"]:
    """Floor: the robot stays where it is."""
    return np.stack([world.hold()[None] for world in worlds])


def uniform(problems: Sequence[Problem]) -> Choose:
    """Floor: every row uniform within the bounds, held for four steps as a planner's knots are apart."""

    def choose(worlds: Sequence[Simulator], done: int) -> Float[np.ndarray, "n h a"]:
        task = worlds[0].task
        draws = [
            np.random.default_rng([problem.row, problem.frame, done]).uniform(task.action_low, task.action_high)
            for problem in problems
        ]
        return np.repeat(np.stack(draws)[:, None], 4, axis=1)

    return choose


def recorded(problems: Sequence[Problem]) -> Choose:
    """Roof: the actions that were recorded between start and goal, then standing still."""

    def choose(worlds: Sequence[Simulator], done: int) -> Float[np.ndarray, "n h a"]:
        if done:
            return still(worlds, done)
        return np.stack([problem.recorded() for problem in problems])

    return choose
