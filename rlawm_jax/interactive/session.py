"""A session: one start frame, the rows given since, what the model makes of them, and the true simulator beside it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from data.episodes import EpisodeStore
from rlawm_jax.interactive.controls import Controls, controls
from rlawm_jax.interactive.rollout import Moment, Rollout
from rlawm_jax.interactive.starts import Start, Starts
from rlawm_jax.sim.protocol import Simulator


@dataclass(frozen=True, eq=False)
class Shown:
    """What a person sees after a step: pictures, distances to the true frame's tokens, seconds that it took.

    `rest` is the row that holds the robot still now, which keys add to. `truth`, `distance` (mean absolute difference
    of DINO tokens) and `copied` (that of the start frame) are None without a simulator.
    """

    moment: Moment
    steps: int
    rest: Float[np.ndarray, " a"]
    imagined: UInt8[np.ndarray, "h w 3"]
    truth: UInt8[np.ndarray, "h w 3"] | None = None
    distance: float | None = None
    copied: float | None = None
    model_seconds: float = 0.0
    simulator_seconds: float = 0.0


class Session:
    """Drives a rollout, and a simulator where `simulator_of` has one for the start's dataset.

    The simulator replays the episode up to the start, and both go on from its frame: recorded first states are not
    exact to the last digit, and contacts magnify that, so now and then it is not quite the recorded frame.

    `stride` is how many steps of the simulator a row of the model stands for. Nothing here is safe to call from two
    threads at once.
    """

    def __init__(
        self,
        rollout: Rollout,
        starts: Starts,
        simulator_of: Callable[[EpisodeStore], Simulator | None],
        *,
        stride: int = 1,
    ) -> None:
        self._rollout, self._starts, self._simulator_of, self._stride = rollout, starts, simulator_of, stride
        self._controls: dict[str, Controls] = {}
        self.number = -1
        self.new_start()
        self._advance(self.shown.rest)  # compiles before anyone waits for it

    def new_start(self) -> None:
        """Go to the next start; its number also draws the noise."""
        start = self._starts[self.number + 1]
        self._go_to(start)
        self.number += 1

    def reset(self) -> None:
        """Go back to the start; the same rows then give the same pictures."""
        self._go_to(self.start)

    def step(self, action: object) -> None:
        """Apply an action row to the model and to the simulator; ActionError, and no change, if it is not one."""
        row = self.controls.check(action)
        self.shown = self._compare(self._advance(row), row)

    def state(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON has it."""
        shown, moment = self.shown, self.shown.moment
        return {
            "dataset": self.start.store.reference,
            "episode": self.start.episode,
            "frame": self.start.frame,
            "steps": shown.steps,
            "chunk": moment.chunk,
            "rows": len(moment.rows),
            "chunk_rows": self._rollout.rows,
            "rest": shown.rest.tolist(),
            "holds": self.start.rest is not None,
            "controls": asdict(self.controls),
            "distance": shown.distance,
            "copied": shown.copied,
            "model_seconds": shown.model_seconds,
            "simulator_seconds": shown.simulator_seconds,
        }

    def _go_to(self, start: Start) -> None:
        simulator = None if start.before is None else self._simulator_of(start.store)
        image = start.image
        if simulator is not None and start.before is not None:
            simulator.replay(*start.before)
            image = simulator.render()
        reference = start.store.reference
        if reference not in self._controls:
            bounds = None if simulator is None else (simulator.task.action_low, simulator.task.action_high)
            self._controls[reference] = controls(start.store, bounds)
        tokens = self._rollout.encode(image)
        shown = Shown(self._rollout.begin(tokens), 0, self._rest(start, None), self._rollout.decode(tokens))
        if simulator is not None:
            shown = replace(shown, truth=image, distance=0.0, copied=0.0)
        self.start, self.simulator, self._copied, self.controls = start, simulator, tokens, self._controls[reference]
        self.shown = shown

    @staticmethod
    def _rest(start: Start, row: Float[np.ndarray, " a"] | None) -> Float[np.ndarray, " a"]:
        """The row that keys add to: the last target where actions are targets, else zeros."""
        if start.store.description.hold_still == "zeros":
            return np.zeros(start.store.action_dim, np.float32)
        if row is not None:
            return row
        return start.recorded if start.rest is None else start.rest

    def _advance(self, row: Float[np.ndarray, " a"]) -> Shown:
        """The model one row further."""
        begin = time.perf_counter()
        moment = self._rollout.step(self.shown.moment, row, robot_id=self.start.robot_id, draw=self.number)
        imagined = self._rollout.decode(moment.tokens)
        seconds = time.perf_counter() - begin
        return Shown(moment, self.shown.steps + 1, self._rest(self.start, row), imagined, model_seconds=seconds)

    def _compare(self, shown: Shown, row: Float[np.ndarray, " a"]) -> Shown:
        """What is shown, with the simulator one row further and the distance to its frame."""
        if self.simulator is None:
            return shown
        begin = time.perf_counter()
        for _ in range(self._stride):
            self.simulator.step(row)
        truth = self.simulator.render()
        tokens = self._rollout.encode(truth)
        return replace(
            shown,
            truth=truth,
            distance=float(np.abs(shown.moment.tokens - tokens).mean()),
            copied=float(np.abs(self._copied - tokens).mean()),
            simulator_seconds=time.perf_counter() - begin,
        )
