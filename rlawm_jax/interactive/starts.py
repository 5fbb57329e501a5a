"""Where a session begins: frames of held-out episodes, in a seeded order that takes the episodes in turn."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from data.episodes import EpisodeStore
from data.pipeline import WindowLoader

SHORTEST = 2  # frames of a window


@dataclass(frozen=True, eq=False)
class Start:
    """A recorded frame; `rest` is the action that holds the robot there, None where the dataset does not say.

    `before` are the episode's first state and the actions that lead to the frame, None where states were not recorded.
    """

    store: EpisodeStore
    episode: int
    frame: int
    image: UInt8[np.ndarray, "h w 3"]
    robot_id: int
    recorded: Float[np.ndarray, " a"]
    rest: Float[np.ndarray, " a"] | None
    before: tuple[Float[np.ndarray, " s"], Float[np.ndarray, "t a"]] | None


class Starts:
    """All frames that a session may begin at; ValueError if no episode is held out."""

    def __init__(self, loader: WindowLoader, *, seed: int) -> None:
        self._loader = loader
        every = sum(int(store.num_frames) for store in loader.stores.values())
        self._windows = loader.validation_windows(SHORTEST, every, seed=seed, at_most=True)
        if not self._windows:
            raise ValueError(
                f"{', '.join(loader.stores)}: expected held-out episodes (ids below "
                f"{loader.config.val_episodes}, data.val_episodes) in {loader.config.root}, found none"
            )

    def __getitem__(self, number: int) -> Start:
        """Start number `number`; after the last comes the first again."""
        window = self._windows[number % len(self._windows)]
        store = self._loader.store_of(window)
        row, frame = window.episode, window.start
        state = store.episode(row).state
        return Start(
            store=store,
            episode=int(store.episode_ids[row]),
            frame=frame,
            image=self._loader.load_window(window, [0])["frames"][0],
            robot_id=self._loader.robot_of(window),
            recorded=store.actions(row)[frame],
            rest=store.hold_still(row, frame),
            before=None if state is None else (state[0], store.actions(row)[:frame]),
        )
