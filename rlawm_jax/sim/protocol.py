"""What every simulator is: reset from a seed, act, look only when asked (looking is the cost)."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True)
class Task:
    """What all episodes of a simulator share; an action row is held for 1 / `control_hz` seconds.

    `score` names a measure of progress in [0, 1]. An episode succeeds, and ends, at the first step whose score exceeds
    `success_above`; else it ends after `max_steps`. How many reach each of `levels` is reported beside that.
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
        """Numbers in an action row."""
        return len(self.action_low)


class Simulator(Protocol):
    """One world. Actions are raw rows as they were recorded; frames are RGB as the training data shows them."""

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
        """Progress now, in [0, 1]."""
        ...

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """What a policy sees now."""
        ...
