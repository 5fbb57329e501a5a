"""Traces: initial states and actions of episodes, enough to replay them in a simulator. Shared by `pusht` and `panda`.

A trace file holds N episodes: start [N,S] (exact initial states), length [N] (frames), actions [sum(length),A] (whole
multiples of a world's step), one array [N,...] for every result that a replay must reproduce, and the versions of the
packages that recorded them.
"""

import abc
import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Float32, UInt8

from data.schema import EpisodeError


class World(Protocol):
    """A simulator that replays: every reset is exact, whatever ran before."""

    def reset(self, state: Float[np.ndarray, "s"]) -> None:
        """Start anew in this state, at rest."""

    def step(self, action: Float[np.ndarray, "a"]) -> None:
        """Let the time of one action pass."""

    @property
    def state(self) -> Float[np.ndarray, "s"]:
        """The state now."""

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """The frame now."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(abc.ABC):
    """One recorded episode: T actions (the last without effect) from an exact start; subclasses add the result."""

    start: Float[np.ndarray, "s"]
    actions: Float32[np.ndarray, "t a"]

    @abc.abstractmethod
    def deviation(self, world: Any) -> tuple[str, str] | None:
        """What a replay should have reached and what it did ("the block to end at [..]", "[..]"); None if it agrees."""


T = TypeVar("T", bound=Trace)


@dataclasses.dataclass(frozen=True)
class TraceFiles(Generic[T]):
    """How a world keeps its traces: `scale` steps of `dtype` make one unit of an action in [low, high]."""

    trace: type[T]
    versions: Callable[[], dict[str, str]]
    folder: Path  # of the committed ones
    dtype: type[np.integer]
    scale: float
    low: float
    high: float

    @property
    def results(self) -> list[str]:
        """The fields that a replay must reproduce."""
        return [field.name for field in dataclasses.fields(self.trace)][2:]

    def quantise(self, action: Float[np.ndarray, "*n a"]) -> Float32[np.ndarray, "*n a"]:
        """The nearest action that a trace file can hold."""
        return (np.round(np.clip(action, self.low, self.high) * self.scale) / self.scale).astype(np.float32)

    def save(self, path: Path, traces: Sequence[T]) -> None:
        """Write a trace file atomically."""
        temporary = path.with_suffix(".tmp.npz")
        np.savez_compressed(
            temporary,
            start=np.stack([trace.start for trace in traces]),
            length=np.array([len(trace.actions) for trace in traces], np.int32),
            actions=np.concatenate([np.round(trace.actions * self.scale).astype(self.dtype) for trace in traces]),
            **{name: np.array([getattr(trace, name) for trace in traces]) for name in self.results},
            **self.versions(),
        )
        temporary.replace(path)

    def load(self, path: Path) -> tuple[list[T], dict[str, str]]:
        """Read a trace file: its traces and the simulator versions that recorded them.

        Raises FileNotFoundError for a missing file, EpisodeError for one that is damaged or of another world.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such trace file; restore it from git or record it again")
        expected = {"start", "length", "actions", *self.results, *self.versions()}
        try:
            with np.load(path) as file:
                if missing := sorted(expected - set(file.files)):
                    raise ValueError(f"no {', '.join(missing)}")
                arrays = {name: file[name] for name in sorted(expected)}
            if arrays["length"].sum() != len(arrays["actions"]):
                raise ValueError(f"{len(arrays['actions'])} actions for {arrays['length'].sum()} frames")
            ends = np.cumsum(arrays["length"])[:-1]
            actions = np.split(arrays["actions"].astype(np.float32) / np.float32(self.scale), ends)
            # arrays stay arrays, numbers become Python's
            results = [list(arrays[name]) if arrays[name].ndim > 1 else arrays[name].tolist() for name in self.results]
            rows = zip(arrays["start"], actions, *results, strict=True)
            return [self.trace(*row) for row in rows], {name: str(arrays[name]) for name in self.versions()}
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise EpisodeError(
                f"{path}: expected a trace file of {', '.join(sorted(expected))}, found: {reason}; restore it from git"
            ) from error

    def replay(
        self, trace: T, world: World, name: str, recorded_with: dict[str, str], render: bool = True
    ) -> tuple[UInt8[np.ndarray, "t h w 3"] | None, Float32[np.ndarray, "t s"]]:
        """Frames (if requested) and states of a trace; frame t and state t are seen before action t.

        Raises EpisodeError if the world does not reproduce the trace's result.
        """
        world.reset(trace.start)
        states, frames = [world.state], [world.render()] if render else []
        for action in trace.actions[:-1]:
            world.step(action)
            states.append(world.state)
            if render:
                frames.append(world.render())
        if deviation := trace.deviation(world):
            expected, found = deviation
            raise EpisodeError(
                f"{name}: replay: expected {expected} as recorded with {recorded_with}, found {found} with "
                f"{self.versions()}; install the pins of launch/requirements-demo.txt on x86-64 Linux"
            )
        return (np.stack(frames) if render else None), np.stack(states).astype(np.float32)
