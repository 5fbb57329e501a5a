"""Committed traces of the arm: initial states and actions, enough to replay every episode in the simulator.

A trace file holds N episodes: start [N,9] (exact initial state), length [N] (frames), actions int8 [sum(length),3]
(hundredths), end [N,9] (the state that a replay must reach), success [N], and the versions that recorded them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8

from data.panda.sim import World, versions
from data.schema import EpisodeError

FOLDER = Path(__file__).parent / "traces"
SCALE = 100.0
TOLERANCE = 1e-4  # metres and radians; a replay with the same packages is exact


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One recorded episode: T actions (the last without effect) from an exact start, and the expected result."""

    start: Float[np.ndarray, "9"]
    actions: Float32[np.ndarray, "t 3"]
    end: Float[np.ndarray, "9"]
    success: bool


def quantise(action: Float[np.ndarray, "*n 3"]) -> Float32[np.ndarray, "*n 3"]:
    """The nearest action that a trace file can hold: multiples of 0.01 in [-1, 1]."""
    return (np.round(np.clip(action, -1.0, 1.0) * SCALE) / SCALE).astype(np.float32)


def save(path: Path, traces: Sequence[Trace]) -> None:
    """Write a trace file atomically."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        start=np.stack([trace.start for trace in traces]),
        length=np.array([len(trace.actions) for trace in traces], np.int32),
        actions=np.concatenate([np.round(trace.actions * SCALE).astype(np.int8) for trace in traces]),
        end=np.stack([trace.end for trace in traces]),
        success=np.array([trace.success for trace in traces]),
        **versions(),
    )
    temporary.replace(path)


def load(path: Path) -> tuple[list[Trace], dict[str, str]]:
    """Read a trace file: its traces and the simulator versions that recorded them."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such trace file; restore it from git or record it again")
    with np.load(path) as file:
        actions = np.split(file["actions"].astype(np.float32) / np.float32(SCALE), np.cumsum(file["length"])[:-1])
        rows = zip(file["start"], actions, file["end"], file["success"].tolist(), strict=True)
        recorded_with = {name: str(file[name]) for name in versions()}
        return [Trace(*row) for row in rows], recorded_with


def replay(
    trace: Trace, world: World, name: str, recorded_with: dict[str, str], render: bool = True
) -> tuple[UInt8[np.ndarray, "t h w 3"] | None, Float32[np.ndarray, "t 9"]]:
    """Frames (if requested) and states of a trace; frame t and state t are seen before action t.

    Raises EpisodeError if the world does not end in the trace's state.
    """
    world.reset(trace.start)
    states, frames = [world.state], [world.render()] if render else []
    for action in trace.actions[:-1]:
        world.step(action)
        states.append(world.state)
        if render:
            frames.append(world.render())
    if not np.abs(world.state - trace.end).max() <= TOLERANCE:
        raise EpisodeError(
            f"{name}: replay: expected the world to end in {trace.end.round(4).tolist()} as recorded with "
            f"{recorded_with}, found {world.state.round(4).tolist()} with {versions()}; install the pins of "
            "launch/requirements-demo.txt on x86-64 Linux"
        )
    return (np.stack(frames) if render else None), np.stack(states).astype(np.float32)
