"""Batches of windows, as a pure function of (configuration, seed, batch number), read ahead by grain.

Item i is sampled with a generator seeded by (seed, i) alone; global batch k holds items k*B .. (k+1)*B-1, and process p
of P takes the p-th contiguous slice of it. So batches do not depend on the number of processes, threads
or workers, and the only iteration state is the number of batches taken.

`configs/base.py` documents the `data` section. Shapes: b batch, r = data.max_horizon action rows.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool, Float32
from ml_collections import ConfigDict

from data.datasets import Datasets
from data.episodes import EpisodeStore
from data.tokens import DTYPE
from data.windows import DatasetWindows, Window, WindowGroup, WindowRule, WindowSampler, validation_windows

SOURCES = ("frames", "tokens")
NEWER = ("last_action", "mask_top", "source")  # settings that older positions do not name
SPLITS = ("train", "validation")
Batch = dict[str, np.ndarray]
BatchSpec = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each array


def open_datasets(config: ConfigDict) -> Datasets:
    """The datasets of every group that windows are drawn from; `config` is the `data` section."""
    references = [ref for group in config.groups.values() if group.weight > 0 for ref in group.datasets]
    if config.mask_top and config.source == "tokens":
        raise ValueError(
            f"data.mask_top: expected 0 with data.source='tokens', whose features are computed with whole masks, found "
            f"{config.mask_top}; set data.source=frames"
        )
    return Datasets(config.root, references, mask_top=config.mask_top)


class WindowLoader:
    """The datasets of a configuration, opened: draws windows and turns them into arrays.

    `config` is the `data` section. `fingerprint` names the backbone and is needed with `source="tokens"`;
    `with_frames` adds frames beside tokens. `datasets` are the config's datasets if they are already open.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        fingerprint: str | None = None,
        with_frames: bool = False,
        datasets: Datasets | None = None,
    ) -> None:
        if config.source not in SOURCES:
            raise ValueError(f"data.source: expected one of {SOURCES}, found {config.source!r}")
        if config.source == "tokens" and fingerprint is None:
            raise ValueError("data.source: expected a backbone fingerprint with 'tokens', found none; pass fingerprint")
        self.config = config
        self.with_frames = with_frames or config.source == "frames"
        self.group_names = list(config.groups)
        self._groups = [config.groups[name] for name in self.group_names]
        datasets = open_datasets(config) if datasets is None else datasets
        if config.source == "tokens" and fingerprint is not None and not datasets.caches:
            datasets.open_tokens(config.token_root, fingerprint)
        self.stores, self.caches = datasets.stores, datasets.caches
        self._check_agreement()

    def _check_agreement(self) -> None:
        stores = list(self.stores.values())
        if not stores:
            raise ValueError("data.groups: expected a dataset in a group of positive weight, found none")
        for field in ("image_size", "has_masks"):
            values = {store.reference: getattr(store, field) for store in stores}
            if len(set(values.values())) > 1:
                raise ValueError(
                    f"data.groups: expected one {field} in all datasets, found {values}; train on them separately"
                )

    @property
    def action_dim(self) -> int:
        """Width of action rows: the widest robot's; narrower rows are padded with zeros."""
        return max(store.action_dim for store in self.stores.values())

    @property
    def rule(self) -> WindowRule:
        """The window rule of the configuration."""
        c = self.config
        return WindowRule(
            c.min_horizon, c.max_horizon, c.stride, c.horizon_sampling, c.interaction.prob, c.min_num_frames
        )

    def groups(self, split: str) -> list[WindowGroup]:
        """The groups restricted to one split ("train" | "validation") of the episodes; groups of weight 0 are empty."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, found {split!r}")
        c = self.config.interaction
        groups = []
        for name, group in zip(self.group_names, self._groups, strict=True):
            datasets = []
            for store in [self.stores[reference] for reference in group.datasets if group.weight > 0]:
                rows = store.rows(self.config.val_episodes, split == "validation")
                frames = store.interacting(c.distance, c.movement, c.buffer)
                datasets.append(DatasetWindows(rows, store.lengths[rows], [frames[row] for row in rows]))
            groups.append(WindowGroup(name, datasets, group.weight, group.min_start_frame))
        return groups

    def store_of(self, window: Window) -> EpisodeStore:
        """The dataset that a window was drawn from."""
        return self.stores[self._groups[window.group].datasets[window.dataset]]

    def validation_windows(self, horizon: int, count: int, *, seed: int = 0, at_most: bool = False) -> list[Window]:
        """The fixed evaluation windows of `horizon` frames (see `windows.validation_windows`)."""
        groups, stride = self.groups("validation"), self.config.stride
        return validation_windows(groups, horizon, count, seed=seed, stride=stride, at_most=at_most)

    def spec(self, rows: int) -> BatchSpec:
        """What `load_pairs` returns for `rows` windows."""
        frame_shape = (*next(iter(self.stores.values())).image_size, 3)
        token_shape = next(iter(self.caches.values())).shape if self.caches else None
        shapes = {"frame_shape": frame_shape if self.with_frames else None, "token_shape": token_shape}
        return batch_spec(self.config, rows, action_dim=self.action_dim, **shapes)

    def load_pairs(self, windows: Sequence[Window], window_ids: Sequence[int]) -> Batch:
        """First and last frame and/or tokens of each window, with the action rows between, zero-padded.

        frames uint8 [b,2,h,w,3], background 0 where there are masks, if with_frames; tokens bf16 [b,2,l,c] with the
        token cache; actions float32 [b,r,a], raw, row i moving frame t+i to t+i+1; num_actions, robot_id,
        horizon int32 [b]; window_id int64 [b]. With data.last_action there is one more row, issued at the last frame.
        """
        ends = [(0, window.horizon - 1) for window in windows]
        counts = [window.horizon - 1 + bool(self.config.last_action) for window in windows]
        actions = np.zeros(*self.spec(len(windows))["actions"])
        for row, window, count in zip(actions, windows, counts, strict=True):
            row[:count] = self.actions(window, count)
        scalars = self._scalars(windows, window_ids) | {"num_actions": np.array(counts, np.int32)}
        return self._observations(windows, ends) | {"actions": actions} | scalars

    def load_window(self, window: Window, positions: Sequence[int] | None = None) -> Batch:
        """A window with the frames between: frames [h,...], tokens [h,l,c], actions [h-1,a], and its scalars.

        `positions` chooses frames within the window (0 .. h-1); all by default.
        """
        positions = range(window.horizon) if positions is None else positions
        batch = self._observations([window], [positions]) | self._scalars([window], [0])
        del batch["window_id"]
        return {key: value[0] for key, value in batch.items()} | {"actions": self.actions(window, window.horizon - 1)}

    def actions(self, window: Window, count: int) -> Float32[np.ndarray, "n a"]:
        """The first `count` action rows of a window, raw, zero-padded to the widest robot's."""
        stride = self.config.stride
        rows = slice(window.start, window.start + count * stride, stride)
        actions = self.store_of(window).actions(window.episode)[rows]
        return np.pad(actions, ((0, 0), (0, self.action_dim - actions.shape[1])))

    def robot_of(self, window: Window) -> int:
        """The id of the robot that a window shows."""
        return int(self.store_of(window).robot_ids[window.episode])

    def hold_still(self, window: Window) -> Float32[np.ndarray, " a"] | None:
        """The action row that holds the robot where it is at the window's start; None where that is not known."""
        row = self.store_of(window).hold_still(window.episode, window.start)
        return None if row is None else np.pad(row, (0, self.action_dim - len(row)))

    def moving_patches(
        self, window: Window, positions: Sequence[int], grid: tuple[int, int]
    ) -> Bool[np.ndarray, "n l"]:
        """The patches near the effector or an object at the window's start or at each position; none if not known.

        `grid` (rows, columns) divides the frame evenly.
        """
        frames = [window.start + self.config.stride * i for i in (0, *positions)]
        first, *rest = self.store_of(window).near_patches(window.episode, frames, grid)
        return np.stack(rest) | first

    def _observations(self, windows: Sequence[Window], positions: Sequence[Sequence[int]]) -> Batch:
        where = [
            [window.start + self.config.stride * i for i in chosen]
            for window, chosen in zip(windows, positions, strict=True)
        ]
        out: Batch = {}
        if self.caches:
            out["tokens"] = self._tokens(windows, where)
        if self.with_frames:
            frames = [self.store_of(w).frames(w.episode, at) for w, at in zip(windows, where, strict=True)]
            out["frames"] = np.stack(frames)
        return out

    def _tokens(self, windows: Sequence[Window], where: Sequence[Sequence[int]]) -> np.ndarray:
        """One read per dataset for the whole batch: per-window reads would pay the call overhead 32 times over."""
        out = np.empty((len(windows), len(where[0]), *next(iter(self.caches.values())).shape), DTYPE)
        references = [self.store_of(window).reference for window in windows]
        for reference in set(references):
            mine = [i for i, name in enumerate(references) if name == reference]
            store = self.stores[reference]
            frames = [store.frame_index(windows[i].episode, np.asarray(where[i])) for i in mine]
            out[mine] = self.caches[reference].read(np.concatenate(frames)).reshape(len(mine), *out.shape[1:])
        return out

    def _scalars(self, windows: Sequence[Window], window_ids: Sequence[int]) -> Batch:
        horizon = np.array([window.horizon for window in windows], np.int32)
        return {
            "num_actions": horizon - 1,
            "robot_id": np.array([self.robot_of(w) for w in windows], np.int32),
            "horizon": horizon,
            "window_id": np.array(window_ids, np.int64),
        }


class WindowBatches:
    """This process's part of global batch k, by random access: the source read by grain."""

    def __init__(
        self, loader: WindowLoader, split: str = "train", process_index: int = 0, process_count: int = 1
    ) -> None:
        size = loader.config.batch_size
        if size % process_count:
            raise ValueError(
                f"data.batch_size: expected a multiple of the {process_count} processes, found {size}; "
                f"it counts the windows of all processes"
            )
        self.loader, self.seed, self.size = loader, loader.config.seed, size
        self.sampler = WindowSampler(loader.groups(split), loader.rule)
        share = size // process_count
        self.slice = range(process_index * share, (process_index + 1) * share)

    def __len__(self) -> int:
        return 2**40  # endless; grain needs a number

    def __getitem__(self, k: int) -> Batch:
        ids = [int(k) * self.size + i for i in self.slice]
        windows = [self.sampler.sample(np.random.default_rng([self.seed, i])) for i in ids]
        return self.loader.load_pairs(windows, ids)


class TrainIterator(Iterator[Batch]):
    """Endless training batches with an exact, JSON-serialisable position: the number of batches taken.

    The state is the same on every process and does not depend on the number of processes, threads or workers.
    `set_state` refuses a state from other draws or arrays (seed, batch size, window rule, datasets, masks, source).
    """

    def __init__(self, batches: WindowBatches, split: str) -> None:
        self._batches, self._position = batches, 0
        self._identity = json.loads(json.dumps({"split": split} | _draws(batches.loader)))
        self._iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:  # opened late: the start position may change until now, and workers start slowly
            self._iterator = self._open()
        batch = next(self._iterator)
        self._position += 1
        return batch

    def _open(self) -> Iterator[Batch]:
        """The batches from this position on, read ahead by threads and, where configured, worker processes."""
        config = self._batches.loader.config
        source = grain.MapDataset.source(self._batches)[self._position :]
        options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
        dataset = source.to_iter_dataset(options)
        if config.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read flags, also outside absl.app
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers))
        return iter(dataset)

    def get_state(self) -> dict[str, Any]:
        """Position after the batches taken so far, and the data it refers to."""
        return self._identity | {"batches": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a saved position; ValueError in one line if it belongs to another iteration."""
        for key, mine in self._identity.items():
            if key in NEWER and key not in state:
                continue
            if key not in state or state[key] != mine:
                raise ValueError(
                    f"data iterator state: data.{key}: expected {state.get(key)!r} as when saved, found {mine!r}; "
                    f"resuming would not continue the same data: set it back"
                )
        if "batches" not in state and state.get("num_workers") != 0:
            raise ValueError(
                "data iterator state: expected the number of batches taken, found worker processes' positions of an "
                "older version; finish that run with the older version"
            )
        # older versions saved grain's position, which with threads is also the number of batches
        self._position = state["batches"] if "batches" in state else state["grain"]["next_index"]
        self._iterator = None


def _draws(loader: WindowLoader) -> dict[str, Any]:
    """All settings that determine which windows are drawn, and what is in their arrays."""
    config = loader.config
    keys = ("batch_size", "seed", "val_episodes", "min_horizon", "max_horizon", "horizon_sampling", "stride")
    digests = {reference: store.digest for reference, store in loader.stores.items()}
    return {key: config[key] for key in (*keys, "min_num_frames", *NEWER)} | {
        "interaction": config.interaction.to_dict(),
        "groups": config.groups.to_dict(),
        "datasets": digests,
    }


def batch_spec(
    config: ConfigDict,
    rows: int,
    *,
    action_dim: int,
    frame_shape: tuple[int, ...] | None,
    token_shape: tuple[int, ...] | None,
) -> BatchSpec:
    """A batch of `rows` windows of datasets without masks, without opening any; `config` is the `data` section.

    `frame_shape` (h, w, 3) and `token_shape` (l, c) are for one frame; None for the one that the batch lacks.
    """
    spec: BatchSpec = {
        "actions": ((rows, config.max_horizon, action_dim), np.float32),
        "num_actions": ((rows,), np.int32),
        "robot_id": ((rows,), np.int32),
        "horizon": ((rows,), np.int32),
        "window_id": ((rows,), np.int64),
    }
    if token_shape is not None:
        spec["tokens"] = ((rows, 2, *token_shape), DTYPE)
    if frame_shape is not None:
        spec["frames"] = ((rows, 2, *frame_shape), np.uint8)
    return spec


def action_limits(loader: WindowLoader) -> tuple[Float32[np.ndarray, " a"], Float32[np.ndarray, " a"]]:
    """Smallest and largest action per dimension over the training episodes, raw units, over all robots having it.

    The last row of an episode has no recorded effect and is left out.
    """
    low = np.full(loader.action_dim, np.inf, np.float32)
    high = -low
    for store in loader.stores.values():
        own = slice(store.action_dim)
        for row in store.rows(loader.config.val_episodes, validation=False):
            actions = store.actions(row)[:-1]
            low[own], high[own] = np.minimum(low[own], actions.min(0)), np.maximum(high[own], actions.max(0))
    return low, high
