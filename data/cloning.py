"""The training data of policies: which episodes provide actions, and batches of (frame, chunk of actions) from memory.

A chunk starts at a frame and holds the `horizon` rows issued from that frame on. As in the release (METHOD.md 13.9),
chunks may extend `pad_after` rows beyond the end of their episode, where the last row is repeated. Batch k is a pure
function of (seed, k), so the only iteration state is the number of batches taken.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, UInt8
from ml_collections import ConfigDict

from data.episodes import EpisodeStore

OLDER = {"resize": "antialias"}  # what positions from before these settings mean
VALIDATION_SHARE = 8  # a batch carries one held-out chunk for this many training chunks
Batch = dict[str, np.ndarray]


class EpisodeRef(NamedTuple):
    """An episode by dataset ("name:split") and row."""

    reference: str
    row: int


@dataclass(frozen=True)
class Roles:
    """Which episodes provide actions, which serve as video only, and which are held out."""

    labelled: list[EpisodeRef]
    video: list[EpisodeRef]
    validation: list[EpisodeRef]

    @property
    def all(self) -> list[EpisodeRef]:
        """Every episode in use, once."""
        return [*self.labelled, *self.video, *self.validation]


def choose_roles(config: ConfigDict, stores: Mapping[str, EpisodeStore], *, with_video: bool) -> Roles:
    """Draw the labelled demonstrations; with video, every other training episode of `demonstrations` and `video`.

    `config` is the `data` section. The draw is determined by the seed, and a smaller draw is a subset of a larger one.
    Raises ValueError if there are fewer demonstrations than requested.
    """
    training, validation = [], []
    for reference in config.demonstrations:
        training += _episodes(stores[reference], config.val_episodes, validation=False)
        validation += _episodes(stores[reference], config.val_episodes, validation=True)
    names = ", ".join(config.demonstrations)
    if not training:
        raise ValueError(
            f"config.data.val_episodes: expected demonstrations with ids from {config.val_episodes} on in {names}, "
            f"found none; lower it"
        )
    if config.n_labelled and config.labelled_fraction != 1.0:
        raise ValueError(
            f"config.data.n_labelled, labelled_fraction: expected one of them, found {config.n_labelled} and "
            f"{config.labelled_fraction}"
        )
    if not 0 < config.labelled_fraction <= 1:
        raise ValueError(f"config.data.labelled_fraction: expected a share in (0, 1], found {config.labelled_fraction}")
    count = config.n_labelled or max(1, round(config.labelled_fraction * len(training)))
    if not 0 < count <= len(training):
        raise ValueError(
            f"config.data.n_labelled: expected 1 to {len(training)}, the training demonstrations of {names}, "
            f"found {count}"
        )
    order = np.random.default_rng([config.seed, 0]).permutation(len(training))
    labelled = sorted(training[i] for i in order[:count])
    video = []
    if with_video:
        watched = [e for name in config.video for e in _episodes(stores[name], config.val_episodes, validation=False)]
        video = sorted({*training, *watched} - set(labelled))
    return Roles(labelled, video, sorted(validation))


def _episodes(store: EpisodeStore, val_episodes: int, *, validation: bool) -> list[EpisodeRef]:
    return [EpisodeRef(store.reference, int(row)) for row in store.rows(val_episodes, validation)]


@dataclass(frozen=True)
class EpisodeArrays:
    """Every episode in use, concatenated in memory; `offsets` [episodes + 1] says where each one begins.

    Action rows are raw, one per frame, and zero where the episode is video only. `images` holds the first
    frame of an episode and every `every`-th after it, `latents` (BC + RLA) those of the chunks that start there.
    """

    offsets: Int[np.ndarray, " e1"]
    every: int
    images: UInt8[np.ndarray, "p s s 3"]
    actions: Float32[np.ndarray, "n a"]
    states: Float32[np.ndarray, "n s"] | None
    latents: Float32[np.ndarray, "p z"] | None


@dataclass(frozen=True)
class Chunks:
    """Chunks by rows of `EpisodeArrays`: first action row [n], kept frame, all action rows [n, horizon], episode."""

    first: Int[np.ndarray, " n"]
    frame: Int[np.ndarray, " n"]
    rows: Int[np.ndarray, "n k"]
    episode: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.first)


def chunk_starts(length: int, horizon: int, pad_after: int) -> Int[np.ndarray, " n"]:
    """Frames of an episode at which a chunk may start."""
    return np.arange(max(0, length - horizon + min(max(pad_after, 0), horizon - 1) + 1))


def frame_offsets(offsets: Int[np.ndarray, " e1"], every: int) -> Int[np.ndarray, " e1"]:
    """Where each episode's frames begin in `EpisodeArrays.images`, which keeps every `every`-th."""
    return np.concatenate([[0], np.cumsum(-(-np.diff(offsets) // every))])


def chunks_of_episodes(
    offsets: Int[np.ndarray, " e1"], episodes: Sequence[int], horizon: int, pad_after: int, every: int = 1
) -> Chunks:
    """The chunks of the episodes with these numbers, from every `every`-th frame."""
    empty = np.zeros(0, np.int64)
    parts = [(empty, empty, np.zeros((0, horizon), np.int64), empty)]
    frames = frame_offsets(offsets, every)
    for episode in episodes:
        begin, end = int(offsets[episode]), int(offsets[episode + 1])
        starts = chunk_starts(end - begin, horizon, pad_after)[::every]
        rows = np.minimum(begin + starts[:, None] + np.arange(horizon), end - 1)
        parts.append((begin + starts, frames[episode] + starts // every, rows, np.full(len(starts), episode)))
    return Chunks(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class PolicyData:
    """Episodes in memory and their chunks by role."""

    def __init__(self, arrays: EpisodeArrays, roles: Roles, *, horizon: int, pad_after: int) -> None:
        self.arrays, self.roles = arrays, roles
        count = 0
        chunks = []
        for episodes in (roles.labelled, roles.video, roles.validation):
            numbers = range(count, count + len(episodes))
            chunks.append(chunks_of_episodes(arrays.offsets, numbers, horizon, pad_after, arrays.every))
            count += len(episodes)
        self.labelled, self.video, self.validation = chunks
        if not len(self.labelled):
            raise ValueError(
                f"config.data.demonstrations: expected an episode of at least {horizon - min(pad_after, horizon - 1)} "
                f"frames among the labelled ones, found none"
            )

    def rows_of_labelled(self) -> slice:
        """The rows of all labelled episodes, on which normalisers are fitted."""
        return slice(0, int(self.arrays.offsets[len(self.roles.labelled)]))

    def load(self, chunks: Chunks, which: Int[np.ndarray, " b"]) -> Batch:
        """Images uint8 [b,s,s,3], actions f32 [b,k,a] raw, and states [b,s] and latents [b,z] where available."""
        arrays, frame = self.arrays, chunks.frame[which]
        batch = {"images": arrays.images[frame], "actions": arrays.actions[chunks.rows[which]]}
        if arrays.states is not None:
            batch["states"] = arrays.states[chunks.first[which]]
        if arrays.latents is not None:
            batch["latents"] = arrays.latents[frame]
        return batch


class PolicyIterator(Iterator[Batch]):
    """Endless training batches: labelled chunks, then video chunks, then a few held-out ones under `validation_...`.

    Every chunk of a role is seen once before any is seen again. Each process takes its contiguous part of the global
    batch; the position counts global batches.
    """

    def __init__(
        self,
        data: PolicyData,
        config: ConfigDict,
        identity: dict[str, Any],
        *,
        shards: int = 1,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`shards`: devices that held-out chunks must divide into; `share` (i, n): feed the i-th of n parts."""
        self._data, self._seed, self._position = data, config.seed, 0
        self._share = share
        labelled = config.batch_size
        if len(data.video):
            if not 0 < config.labelled_share < 1:
                raise ValueError(
                    f"config.data.labelled_share: expected a share in (0, 1), found {config.labelled_share}"
                )
            labelled = min(max(1, round(config.labelled_share * config.batch_size)), config.batch_size - 1)
        held_out = -(-config.batch_size // VALIDATION_SHARE // shards) * shards if len(data.validation) else 0
        self._parts = (
            ("labelled", data.labelled, labelled),
            ("video", data.video, config.batch_size - labelled),
            ("validation", data.validation, held_out),
        )
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        keys = ("seed", "batch_size", "val_episodes", "n_labelled", "labelled_fraction", "labelled_share", "pad_after")
        keys += ("every",)
        self._identity = json.loads(json.dumps({key: config[key] for key in keys} | identity))

    def __next__(self) -> Batch:
        k = self._position
        self._position += 1
        loaded = {
            name: self._data.load(chunks, self._draw(name, len(chunks), range(k * size, (k + 1) * size)))
            for name, chunks, size in self._parts
            if size
        }
        labelled = len(loaded["labelled"]["images"])
        training = [loaded[name] for name in ("labelled", "video") if name in loaded]
        batch = {name: np.concatenate([part[name] for part in training]) for name in training[0]}
        batch["has_actions"] = np.arange(len(batch["images"])) < labelled
        if "validation" in loaded:
            batch |= {f"validation_{name}": value for name, value in loaded["validation"].items()}
        return {name: self._own(value) for name, value in batch.items()}

    def _draw(self, name: str, count: int, items: range) -> Int[np.ndarray, " b"]:
        """The chunks numbered `items` in an endless sequence of shuffled passes."""
        return np.array([self._order(name, i // count, count)[i % count] for i in items])

    def _order(self, name: str, epoch: int, count: int) -> Int[np.ndarray, " n"]:
        if (name, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key != (name, epoch - 2)}
            role = [part[0] for part in self._parts].index(name)
            self._orders[name, epoch] = np.random.default_rng([self._seed, 1, role, epoch]).permutation(count)
        return self._orders[name, epoch]

    def _own(self, value: np.ndarray) -> np.ndarray:
        index, count = self._share
        size = len(value) // count
        return value[index * size : (index + 1) * size]

    def get_state(self) -> dict[str, Any]:
        """How many batches were taken, and from which data."""
        return self._identity | {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a saved position; ValueError in one line if it belongs to other data."""
        state = OLDER | state
        for key, mine in self._identity.items():
            if key not in state or state[key] != mine:
                raise ValueError(
                    f"data iterator state: {key}: expected {state.get(key)!r} as when saved, found {mine!r}; "
                    f"resuming would not continue the same training: set it back or choose another --workdir"
                )
        self._position = int(state["position"])
