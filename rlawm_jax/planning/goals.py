"""Planning problems taken from recorded episodes: from one frame to another one `ahead` frames later."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from data.episodes import EpisodeStore


@dataclass(frozen=True, eq=False)
class Problem:
    """A start and a goal of one episode; positions [1 + objects, d] are effector, then objects, in the data's unit."""

    row: int
    frame: int
    first_state: Float[np.ndarray, " s"]
    actions: Float[np.ndarray, "t a"]  # the whole episode's
    goal_frame: UInt8[np.ndarray, "h w 3"]
    goal_positions: Float[np.ndarray, "p d"]
    start_positions: Float[np.ndarray, "p d"]
    ahead: int

    def recorded(self) -> Float[np.ndarray, "h a"]:
        """The actions that led from the start to the goal."""
        return self.actions[self.frame : self.frame + self.ahead]


def problems(store: EpisodeStore, rows: np.ndarray, ahead: int, count: int, *, seed: int) -> list[Problem]:
    """`count` problems from the given episodes: as even a number from each as possible, frames drawn by `seed`.

    Raises ValueError if the episodes hold no states or positions, or are all too short.
    """
    if not len(rows):
        raise ValueError(f"{store.reference}: expected held-out episodes (ids below data.val_episodes), found none")
    usable = [int(row) for row in rows if store.lengths[row] > ahead]
    if not usable:
        raise ValueError(f"--ahead: expected fewer than the frames of the episodes of {store.reference}, found {ahead}")
    rng = np.random.default_rng([seed, ahead])
    order = np.concatenate([rng.permutation(usable) for _ in range(-(-count // len(usable)))])[:count]
    episodes = {}
    chosen = []
    for row in order:
        episode = episodes.setdefault(row, store.episode(row))
        if episode.state is None:
            raise ValueError(f"{store.reference}: expected recorded states to start the simulator in, found none")
        positions = store.positions(row)
        t = int(rng.integers(store.lengths[row] - ahead))
        chosen.append(
            Problem(
                int(row), t, episode.state[0], episode.actions, episode.frames[t + ahead], positions[t + ahead],
                positions[t], ahead,
            )
        )  # fmt: skip
    return chosen
