"""Episodes in lockstep: one policy acts in many worlds in batches; b worlds, n action rows, a action dimensions."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from rlawm_jax.sim.protocol import Simulator

WORLDS = 32  # a PyBullet world takes 100 MB

Progress = Callable[[int], Any]


class FramePolicy(Protocol):
    """Maps frames to chunks of raw action rows."""

    image_size: int

    def act(self, frames: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b n a"]:
        """The rows to execute before the next frame is rendered, for every frame."""
        ...


class Episode:
    """A running or finished episode: its score after every step, and every frame if it is recorded."""

    def __init__(self, world: Simulator, seed: int, *, recorded: bool = False) -> None:
        self.world, self.seed = world, seed
        self.scores: list[float] = []
        self.success = False
        self.rows = 0  # in the last chunk given
        world.reset(seed)
        self.frames = [world.render()] if recorded else None

    @property
    def steps(self) -> int:
        """Action rows executed."""
        return len(self.scores)

    @property
    def over(self) -> bool:
        """Whether it succeeded or ran out of steps."""
        return self.success or self.steps >= self.world.task.max_steps

    def execute(self, chunk: Float[np.ndarray, "n a"]) -> None:
        """Apply rows until the chunk or the episode ends."""
        self.rows = len(chunk)
        for action in chunk:
            if self.over:
                return
            self.world.step(action)
            self.scores.append(self.world.score())
            self.success = self.scores[-1] > self.world.task.success_above
            if self.frames is not None:
                self.frames.append(self.world.render())


Decide = Callable[[Sequence[Episode]], Float[np.ndarray, "b n a"]]


def rollout(
    make_world: Callable[[], Simulator],
    decide: Decide,
    seeds: Sequence[int],
    *,
    worlds: int = WORLDS,
    videos: int = 0,
    progress: Progress = lambda steps: None,
) -> list[Episode]:
    """Run one episode per seed to its end, recording the first `videos`; `progress` is given the steps completed.

    At most `worlds` run at a time; the world of an episode that is over serves the next seed. An episode that ends
    early counts its remaining steps as completed.
    """
    free = [make_world() for _ in range(min(worlds, len(seeds)))]
    episodes: list[Episode] = []
    while True:
        while free and len(episodes) < len(seeds):
            recorded = len(episodes) < videos
            episodes.append(Episode(free.pop(), seeds[len(episodes)], recorded=recorded))
        running = [episode for episode in episodes if not episode.over]
        if not running:
            return episodes
        for episode, chunk in zip(running, _checked(decide(running), running), strict=True):
            before = episode.steps
            episode.execute(chunk)
            progress((episode.world.task.max_steps if episode.over else episode.steps) - before)
            if episode.over:
                free.append(episode.world)


def _checked(chunks: np.ndarray, running: Sequence[Episode]) -> Float[np.ndarray, "b n a"]:
    chunks, wanted = np.asarray(chunks), (len(running), "1 or more", running[0].world.task.action_dim)
    if chunks.ndim != 3 or (len(chunks), chunks.shape[2]) != (wanted[0], wanted[2]) or not chunks.shape[1]:
        raise ValueError(
            f"policy: expected actions [{', '.join(map(str, wanted))}] (worlds, rows, action_dim of "
            f"{running[0].world.task.simulator}), found {list(chunks.shape)}; was it trained for this simulator?"
        )
    finite = np.isfinite(chunks).all(axis=(1, 2))
    if not finite.all():
        worst = running[int(finite.argmin())]
        raise FloatingPointError(
            f"policy: expected finite actions, found NaN or infinity for seed {worst.seed} at step {worst.steps}; "
            "its training has diverged: evaluate an older checkpoint or train again with a lower learning rate"
        )
    return chunks


def watching(policy: FramePolicy, batch_size: int) -> Decide:
    """The policy applied to the current frame of every world, in batches of one size (one compiled program)."""

    def decide(running: Sequence[Episode]) -> np.ndarray:
        chunks = []
        for i in range(0, len(running), batch_size):
            frames = np.stack([episode.world.render() for episode in running[i : i + batch_size]])
            filler = np.repeat(frames[-1:], batch_size - len(frames), axis=0)
            chunks.append(np.asarray(policy.act(np.concatenate([frames, filler])))[: len(frames)])
        return np.concatenate(chunks)

    return decide


def still(rows: int) -> Decide:
    """Baseline: the robot stays where it is."""
    return lambda running: np.stack([np.tile(episode.world.hold(), (rows, 1)) for episode in running])


def uniform(rows: int) -> Decide:
    """Baseline: every row uniform within the bounds, determined by the episode's seed and step alone."""

    def draw(episode: Episode) -> Float[np.ndarray, "n a"]:
        task, rng = episode.world.task, np.random.default_rng([episode.seed, episode.steps])
        return rng.uniform(task.action_low, task.action_high, (rows, task.action_dim))

    return lambda running: np.stack([draw(episode) for episode in running])
