"""The interface of every simulator: reset from a seed, step, and render only on request (rendering is expensive)."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True)
class Task:
    """Settings that all episodes of a simulator share; an action row is held for 1 / `control_hz` seconds.

    `score` names a measure of progress in [0, 1]. An episode succeeds, and ends, at the first step whose score exceeds
    `success_above`; otherwise it ends after `max_steps`. How many reach each of `levels` is reported as well.
    """

    simulator: str
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    control_hz: float
    max_steps: int
    score: str
    success_above: float
    levels: tuple[float, ...]
    starts: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def action_dim(self) -> int:
        """Number of values in an action row."""
        return len(self.action_low)


class Simulator(Protocol):
    """One world. Actions are raw rows as recorded; frames are RGB as in the training data."""

    task: Task

    def reset(self, seed: int) -> None:
        """Start a new episode; equal seeds give equal starts."""
        ...

    def step(self, action: Float[np.ndarray, " a"]) -> None:
        """Apply an action row, clipped to the task's bounds."""
        ...

    def hold(self) -> Float[np.ndarray, " a"]:
        """The action that leaves the robot where it is."""
        ...

    def score(self) -> float:
        """Current progress, in [0, 1]."""
        ...

    def replay(self, state: Float[np.ndarray, " s"], actions: Float[np.ndarray, "t a"]) -> None:
        """Start a new episode in a recorded first state and execute recorded actions."""
        ...

    def positions(self) -> Float[np.ndarray, "p d"]:
        """Where effector and objects are, in the dataset's unit of length: effector first."""
        ...

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The current frame, as a policy sees it."""
        ...
