"""Committed Push-T traces: initial states and actions, enough to replay every episode in the simulator.

A trace file holds N episodes: start [N,5] (exact initial state), length [N] (frames), actions uint16 [sum(length),2]
(targets in 1/64 pixel), final_block [N,3] and coverage [N] (what the replay must reproduce), and the versions of the
simulator that recorded them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8

from data.pusht.sim import PushT, versions
from data.schema import EpisodeError

FOLDER = Path(__file__).parent / "traces"
SCALE = 64.0
POSE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """One recorded episode: T actions (the last without effect) from an exact start, and the expected result."""

    start: Float[np.ndarray, "5"]
    actions: Float32[np.ndarray, "t 2"]
    final_block: Float[np.ndarray, "3"]
    coverage: float


def quantise(action: Float[np.ndarray, "*n 2"]) -> Float32[np.ndarray, "*n 2"]:
    """The nearest action that a trace file can hold: multiples of 1/64 pixel in [0, 512]."""
    return (np.round(np.clip(action, 0.0, 512.0) * SCALE) / SCALE).astype(np.float32)


def save(path: Path, traces: Sequence[Trace]) -> None:
    """Write a trace file atomically."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        start=np.stack([trace.start for trace in traces]),
        length=np.array([len(trace.actions) for trace in traces], np.int32),
        actions=np.concatenate([np.round(trace.actions * SCALE).astype(np.uint16) for trace in traces]),
        final_block=np.stack([trace.final_block for trace in traces]),
        coverage=np.array([trace.coverage for trace in traces]),
        **versions(),
    )
    temporary.replace(path)


def load(path: Path) -> tuple[list[Trace], dict[str, str]]:
    """Read a trace file: its traces and the simulator versions that recorded them."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such trace file; restore it from git or record it again")
    with np.load(path) as file:
        actions = np.split(file["actions"].astype(np.float32) / np.float32(SCALE), np.cumsum(file["length"])[:-1])
        rows = zip(file["start"], actions, file["final_block"], file["coverage"].tolist(), strict=True)
        recorded_with = {name: str(file[name]) for name in versions()}
        return [Trace(*row) for row in rows], recorded_with


def replay(
    trace: Trace, sim: PushT, name: str, recorded_with: dict[str, str], render: bool = True
) -> tuple[UInt8[np.ndarray, "t h w 3"] | None, Float32[np.ndarray, "t 5"]]:
    """Frames (if requested) and states of a trace; frame t and state t are seen before action t.

    Raises EpisodeError if the block does not end at the pose in the trace.
    """
    states, frames = [], []
    for _ in _play(trace, sim):
        states.append(sim.state.astype(np.float32))
        if render:
            frames.append(sim.render())
    deviation = np.abs(sim.block - trace.final_block).max()
    if not deviation <= POSE_TOLERANCE or abs(sim.coverage() - trace.coverage) > POSE_TOLERANCE:
        raise EpisodeError(
            f"{name}: replay: expected the block to end at {trace.final_block.round(3).tolist()} as recorded with "
            f"{recorded_with}, found {sim.block.round(3).tolist()} with {versions()}; install the pins of "
            "launch/requirements-demo.txt on x86-64 Linux"
        )
    return (np.stack(frames) if render else None), np.stack(states)


def _play(trace: Trace, sim: PushT) -> Iterator[None]:
    sim.reset(trace.start)
    yield
    for action in trace.actions[:-1]:
        sim.step(action)
        yield
