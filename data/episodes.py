"""Random access to the episodes of one dataset split, with an in-memory index of everything but the frames.

Neither a dataset builder nor TensorFlow is needed: `EpisodeStore` reads the TFDS folder directly.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, Int, UInt8

from data import schema
from data.description import read_description
from data.masks import apply_mask, check_mask_top
from data.windows import interacting_frames

INDEX_FORMAT = 2


def dataset_directory(root: str | Path, name: str, split: str) -> Path:
    """Folder of the one build under root/name that has the split; name is "dataset" or "dataset/config[/version]".

    FileNotFoundError if nothing is built there, ValueError if no build has the split or several have.
    """
    base = Path(root) / name
    every = sorted({p.parent for depth in ("", "*/", "*/*/") for p in base.glob(depth + "dataset_info.json")})
    splits = {build: set(tfds.builder_from_directory(build).info.splits) for build in every}
    builds = [build for build in every if split in splits[build]]
    if every and not builds:
        there = ", ".join(sorted(set.union(*splits.values())))
        raise ValueError(f"dataset {name!r}: expected a split {split!r}, found {there}; correct the reference")
    if not builds:
        raise FileNotFoundError(
            f"dataset {name!r}: expected a built dataset in {base}, found none; "
            f"build it: python -m data.build {name.split('/', 1)[0]} --data_dir={root}"
        )
    if len(builds) > 1:
        choices = ", ".join(str(path.relative_to(root)) for path in builds)
        raise ValueError(
            f"dataset {name!r}: expected one build with the split {split!r} in {base}, found {choices}; "
            f"name one of them"
        )
    return builds[0]


class EpisodeStore:
    """Episodes of one split by row, frames decoded one by one.

    `reference` is "name:split", for example "pusht:play": a folder under `root` that holds one build with that split.
    Rows are in stored order; `episode_ids` are those of the dataset. `frame_index` also numbers frames
    across the whole split, row after row. `mask_top` is as in `masks.apply_mask`. Pickled as its folder and index:
    worker processes reopen the files.
    """

    def __init__(self, root: str | Path, reference: str, *, mask_top: float = 0.0) -> None:
        name, separator, split = reference.partition(":")
        if not (name and separator and split):
            raise ValueError(f"dataset reference: expected 'name:split' (such as 'pusht:play'), found {reference!r}")
        self.reference = reference
        self.split = split
        self.directory = dataset_directory(root, name, split)
        builder = tfds.builder_from_directory(self.directory)
        self.version = str(builder.info.version)
        self._files = [Path(path) for path in builder.info.splits[split].filepaths]
        self._index = self._load_index()
        features = builder.info.features
        widths = {name: features[name].shape[-1] for name in features if features[name].shape}
        self.description = read_description(builder.info.metadata, self.directory, widths)
        self.lengths: Int[np.ndarray, " n"] = self._index["lengths"]
        self.episode_ids: Int[np.ndarray, " n"] = self._index["episode_ids"]
        self.robot_ids: Int[np.ndarray, " n"] = self._index["robot_ids"]
        self.offsets: Int[np.ndarray, " n"] = np.concatenate([[0], np.cumsum(self.lengths)])
        self.digest: str = str(self._index["digest"])
        self.image_size: tuple[int, int] = tuple(map(int, self._index["image_size"]))
        self.has_masks = bool(self._index["has_masks"])
        check_mask_top(mask_top, has_masks=self.has_masks)
        self.mask_top = mask_top

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_examples"}

    @property
    def num_frames(self) -> int:
        """Total number of frames in all episodes."""
        return int(self.offsets[-1])

    @property
    def action_dim(self) -> int:
        """Width of an action row."""
        return self._index["actions"].shape[1]

    def frame_index(self, row: int, frame: int | np.ndarray) -> Any:
        """Number of a frame within the whole split."""
        return self.offsets[row] + frame

    def actions(self, row: int) -> Float32[np.ndarray, "t a"]:
        """All action rows of an episode, raw units, from memory."""
        return self._index["actions"][self.offsets[row] : self.offsets[row + 1]]

    def positions(self, row: int) -> Float32[np.ndarray, "t p d"]:
        """Where the effector and the objects are in every frame of an episode, in the dataset's unit, from memory.

        Raises ValueError where the dataset records none.
        """
        if "effector_position" not in self._index:
            raise ValueError(f"{self.reference}: expected recorded positions of effector and objects, found none")
        frames = slice(self.offsets[row], self.offsets[row + 1])
        effector, objects = self._index["effector_position"][frames], self._index["object_positions"][frames]
        return np.concatenate([effector[:, None], objects], axis=1)

    def frames(self, row: int, which: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
        """The chosen frames of an episode as the model sees them: background 0 where there are masks."""
        return apply_mask(*self.recorded(row, which), self.mask_top)

    def recorded(
        self, row: int, which: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "n h w 3"], Bool[np.ndarray, "n h w"] | None]:
        """The chosen frames as they were recorded, and their foreground masks (None where the dataset has none)."""
        example = self._examples[int(row)]
        masks = schema.decode_images(example["foreground_mask"][list(which)]) if self.has_masks else None
        return schema.decode_images(example["frames"][list(which)]), masks

    def episode(self, row: int) -> schema.Episode:
        """A whole episode, every frame decoded."""
        return schema.from_example(self._examples[int(row)])

    def rows(self, val_episodes: int, validation: bool) -> Int[np.ndarray, " n"]:
        """Rows of the validation episodes (ids below `val_episodes`) or of the training ones."""
        return np.flatnonzero((self.episode_ids < val_episodes) == validation)

    def interacting(self, distance: float, movement: float, buffer: int) -> list[Int[np.ndarray, " k"]]:
        """Interacting frames of every episode; empty where the dataset has no positions."""
        if "effector_position" not in self._index:
            return [np.zeros(0, np.int64)] * len(self)
        effector, objects = self._index["effector_position"], self._index["object_positions"]
        spans = [slice(a, b) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        return [interacting_frames(effector[s], objects[s], distance, movement, buffer) for s in spans]

    def near_patches(self, row: int, which: Sequence[int], grid: tuple[int, int]) -> Bool[np.ndarray, "n l"]:
        """The patches of the chosen frames that the effector or an object may cover; none where that is not known."""
        projection = self.description.projection
        if projection is None:
            return np.zeros((len(which), grid[0] * grid[1]), np.bool_)
        frames = self.frame_index(row, np.asarray(which))
        return projection.near(self._index["effector_position"][frames], self._index["object_positions"][frames], grid)

    def hold_still(self, row: int, frame: int) -> Float32[np.ndarray, " a"] | None:
        """The raw action that holds the robot where it is at a frame; None where the dataset does not say."""
        if self.description.hold_still != "state":
            return None if self.description.hold_still is None else np.zeros(self.action_dim, np.float32)
        return np.asarray(self._examples[int(row)]["state"][frame, : self.action_dim], np.float32)

    @cached_property
    def _examples(self) -> Any:
        return tfds.builder_from_directory(self.directory).as_data_source(self.split)

    def _stamp(self) -> str:
        """Identifies a stale index: format, and name, size and time of every file."""
        stats = [(path.name, path.stat()) for path in self._files]
        return json.dumps([INDEX_FORMAT, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])

    def _load_index(self) -> dict[str, np.ndarray]:
        """The cached index if it belongs to exactly these files, else a new one, cached if the folder is writable."""
        path = self.directory / f"index-{self.split}.npz"
        stamp = self._stamp()
        if path.exists():
            try:
                with np.load(path) as stored:
                    if str(stored["stamp"]) == stamp:
                        return dict(stored)
            except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # damaged or foreign: it is only a cache
        index = self._build_index() | {"stamp": np.array(stamp)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(partial, **index)
            partial.replace(path)
        except OSError:  # read-only folder: keep it in memory
            partial.unlink(missing_ok=True)
        return index

    def _build_index(self) -> dict[str, np.ndarray]:
        builder = tfds.builder_from_directory(self.directory)
        records = builder.as_data_source(self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        if not len(records):
            raise ValueError(f"dataset {self.reference!r}: expected episodes in {self.directory}, found none; rebuild")
        digest = hashlib.blake2b(digest_size=16)
        columns: dict[str, list[Any]] = {}
        kept = ("actions", "episode_id", "robot_id", "effector_position", "object_positions")
        for record in records:
            example = builder.info.features.deserialize_example_np(record)
            _add(digest, example)
            for key in kept:
                if key in example:
                    columns.setdefault(key, []).append(example[key])
            columns.setdefault("length", []).append(len(example["frames"]))
        index = {key: np.concatenate(columns[key]) for key in kept if np.ndim(columns.get(key, [0])[0]) > 0}
        return index | {
            "lengths": np.array(columns["length"], np.int64),
            "episode_ids": np.array(columns["episode_id"], np.int64),
            "robot_ids": np.array(columns["robot_id"], np.int32),
            "image_size": np.array(schema.decode_images(example["frames"][:1]).shape[1:3]),
            "has_masks": np.array("foreground_mask" in example),
            "digest": np.array(digest.hexdigest()),
        }


def _add(digest: Any, example: dict[str, Any]) -> None:
    """Add an episode's content to a digest; the record's bytes will not do, as their field order is arbitrary."""
    for key in sorted(example):
        value = np.asarray(example[key])
        digest.update(f"{key} {value.dtype.kind} {value.shape}".encode())
        for part in value.ravel() if value.dtype.kind in "OSU" else [value.tobytes()]:
            content = part if isinstance(part, bytes) else str(part).encode()
            digest.update(len(content).to_bytes(8, "little") + content)
