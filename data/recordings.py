"""Recordings on disk -> a TFDS dataset: episodes read in parallel, one at a time per worker, shard after shard.

A `Layout` knows how one kind of dataset is laid out on disk; everything else is implemented once, here. A shard is
written beside the dataset (VERSION.partial) and renamed when complete, so a stopped build resumes where it was; the
dataset folder itself appears only when everything is complete. An episode that cannot be read is left out and listed
with the reason in skipped.json; with `strict` the build stops there instead.

TFDS's own generator-based writer keeps up to 1 GB in memory and needs TensorFlow beyond that; writing the shards here
needs neither.
"""

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters
from tensorflow_datasets.core.splits import SplitDict, SplitInfo
from tqdm import tqdm

from data.schema import Episode, EpisodeError, Spec, features, to_example

FORMAT = 1
EPISODES_PER_SHARD = 8
SHARDS_PER_SPLIT = 128  # at most: a reader keeps every shard open
SKIPPED = "skipped.json"


class BuildError(RuntimeError):
    """A build cannot continue; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """One episode still to be read: its split and id, its name in messages, and the files it is read from."""

    split: str
    episode_id: int
    name: str
    files: tuple[Path, ...]


class Layout(abc.ABC):
    """How the recordings of one dataset are laid out on disk; small and picklable, as it is sent to the workers.

    Its `repr` must reflect everything that changes what is read: shards with a different one are not reused.
    """

    name: str  # of the dataset's config, without the image size
    spec: Spec
    metadata: dict[str, Any]

    @abc.abstractmethod
    def recordings(self) -> list[Recording]:
        """Every episode, ids ascending within each split."""

    @abc.abstractmethod
    def read(self, recording: Recording) -> tuple[Episode, str]:
        """The episode, and a note on any repairs ("" for none); EpisodeError if it is unusable."""


@dataclasses.dataclass(eq=False)
class RecordingsConfig(tfds.core.BuilderConfig):
    """What to read, the codec of stored frames, how many episodes of each split, whether a bad one stops it."""

    layout: Layout = None  # pyright: ignore[reportAssignmentType]  # fields of the base class have defaults
    codec: Literal["png", "jpeg"] = "png"
    limit: int | None = None
    strict: bool = False
    workers: int = 1

    @classmethod
    def of(cls, layout: Layout, **options: Any) -> "RecordingsConfig":
        """The config, named after its settings so that builds of different sizes live side by side."""
        config = cls(name="", layout=layout, **options)
        parts = [layout.name, f"{layout.spec.image_size[0]}px"]
        parts += ["jpeg"] if config.codec == "jpeg" else []
        parts += [f"first{config.limit}"] if config.limit is not None else []
        config.name = "_".join(part for part in parts if part)
        return config


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive recordings of one split and the file they are written to; `stamp` identifies the sources."""

    layout: Layout
    recordings: tuple[Recording, ...]
    path: Path
    stamp: str
    codec: Literal["png", "jpeg"]
    strict: bool

    @property
    def report_path(self) -> Path:
        """Written last: a shard that has it is complete."""
        return self.path.with_suffix(".json")

    def report(self) -> dict[str, Any] | None:
        """The report of what was written, if exactly this shard is complete."""
        try:
            report = json.loads(self.report_path.read_text())
        except (OSError, ValueError):
            return None
        return report if report.get("stamp") == self.stamp and self.path.is_file() else None


@functools.lru_cache(maxsize=1)
def _features(spec: Spec) -> tfds.features.FeaturesDict:
    return features(spec)


def write_shard(shard: Shard) -> None:
    """Write the recordings one by one to the shard's file, then its report; does nothing if that exists."""
    if shard.report() is not None:
        return
    report: dict[str, Any] = {"stamp": shard.stamp, "episodes": 0, "frames": 0, "skipped": [], "notes": []}

    def examples() -> Iterator[tuple[int, bytes]]:
        for recording in shard.recordings:
            about = {"split": recording.split, "episode": recording.episode_id}
            try:
                episode, note = shard.layout.read(recording)
                example = to_example(episode, recording.name, shard.layout.spec, shard.codec)
            except Exception as error:  # a damaged file may raise anything: only this episode is affected
                reason = _reason(recording, error)
                if shard.strict:
                    raise EpisodeError(reason) from error
                report["skipped"].append(about | {"reason": reason})
                continue
            if note:
                report["notes"].append(about | {"note": note})
            report["episodes"] += 1
            report["frames"] += len(episode.frames)
            yield recording.episode_id, _features(shard.layout.spec).serialize_example(example)

    partial = shard.path.with_name(f".{shard.path.name}.{os.getpid()}")
    try:
        file_adapters.ArrayRecordFileAdapter.write_examples(partial, examples())
        partial.replace(shard.path)
        partial.write_text(json.dumps(report))
        partial.replace(shard.report_path)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        wanted = f"{shard.path}: expected to write the shard, found: {reason}"
        raise BuildError(
            f"{wanted}; free some disk space and run the same command again; complete shards are kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _reason(recording: Recording, error: Exception) -> str:
    if isinstance(error, EpisodeError):
        return str(error)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{recording.name}: expected a readable episode, found {reason}; export it again"


class RecordingsBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """TFDS builder of what a `Layout` reads; subclasses give name, version and docstring."""

    @property
    def config(self) -> RecordingsConfig:
        """The builder's config."""
        assert isinstance(self.builder_config, RecordingsConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features(self.config.layout.spec),
            metadata=tfds.core.MetadataDict(self.config.layout.metadata),
            disable_shuffling=True,
        )

    def download_and_prepare(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Read and write what an unfinished build still lacks, then make the dataset visible."""
        final = Path(self.data_dir)
        if not final.exists():
            self._write(kwargs.get("download_config"))
        super().download_and_prepare(**kwargs)
        for leftover in (self.partial_dir, *final.parent.glob(f"incomplete.*_{final.name}")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> Any:
        raise NotImplementedError("the shards exist before _download_and_prepare")

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        """Put the shards and the list of what was skipped into the dataset's folder and describe the splits."""
        del dl_manager, download_config
        splits, summary = [], {"skipped": [], "notes": []}
        for split, shards in itertools.groupby(self.shards, key=lambda shard: shard.recordings[0].split):
            reports = [(shard.path, _complete_report(shard)) for shard in shards]
            for key, entries in summary.items():
                entries += [entry for _, report in reports for entry in report[key]]
            kept = [(path, report["episodes"]) for path, report in reports if report["episodes"]]
            if not kept:
                continue
            template = self._get_filename_template(split_name=split)
            for index, (path, _) in enumerate(kept):
                _link(path, Path(template.sharded_filepath(shard_index=index, num_shards=len(kept))))
            size = sum(path.stat().st_size for path, _ in kept)
            lengths = [episodes for _, episodes in kept]
            splits.append(SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
        if not splits:
            first = summary["skipped"][0]["reason"] if summary["skipped"] else "there are none"
            raise BuildError(f"{self.config.name}: expected a usable episode, found none; the first: {first}")
        self.info.set_splits(SplitDict(splits))
        (Path(self.data_dir) / SKIPPED).write_text(json.dumps(summary, indent=1))

    @functools.cached_property
    def partial_dir(self) -> Path:
        """Folder of finished shards until all are complete."""
        final = Path(self.data_dir)
        return final.with_name(f"{final.name}.partial")

    @functools.cached_property
    def shards(self) -> list[Shard]:
        """Every shard to write, split after split; the same for the same recordings and settings."""
        config = self.config
        splits: dict[str, list[Recording]] = {}
        for recording in config.layout.recordings():
            splits.setdefault(recording.split, []).append(recording)
        shards = []
        for split, recordings in splits.items():
            chosen = recordings[: config.limit]
            size = max(EPISODES_PER_SHARD, -(-len(chosen) // SHARDS_PER_SPLIT))
            for index, first in enumerate(range(0, len(chosen), size)):
                part = tuple(chosen[first : first + size])
                path = self.partial_dir / f"{split}-{index:05d}.array_record"
                shards.append(Shard(config.layout, part, path, _stamp(config, part), config.codec, config.strict))
        return shards

    def _write(self, download_config: tfds.download.DownloadConfig | None) -> None:
        missing = [shard for shard in self.shards if shard.report() is None]
        total, open_ = (sum(len(shard.recordings) for shard in shards) for shards in (self.shards, missing))
        self.partial_dir.mkdir(parents=True, exist_ok=True)
        try:
            with tqdm(total=total, initial=total - open_, unit=" episodes", desc=self.config.name) as bar:
                for shard in _written(missing, self.config.workers, download_config):
                    bar.update(len(shard.recordings))
        finally:
            if not any(self.partial_dir.iterdir()):
                self.partial_dir.rmdir()


def _complete_report(shard: Shard) -> dict[str, Any]:
    report = shard.report()
    if report is None:
        raise BuildError(f"{shard.path}: expected a complete shard, found none; run the same command again")
    return report


def _stamp(config: RecordingsConfig, recordings: Iterable[Recording]) -> str:
    """Changes with the format, the settings, and name, size and time of every file that is read."""
    digest = hashlib.blake2b(f"{FORMAT} {config.codec} {config.layout!r}".encode(), digest_size=16)
    for recording in recordings:
        digest.update(repr((recording.split, recording.episode_id, recording.name)).encode())
        for path in recording.files:
            stat = path.stat() if path.exists() else None  # a dangling link: reading it will report this
            digest.update(repr((path.name, stat and (stat.st_size, stat.st_mtime_ns))).encode())
    return digest.hexdigest()


def _link(source: Path, target: Path) -> None:
    """A hard link, so that an interrupted build keeps its shard; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _written(
    shards: list[Shard], workers: int, download_config: tfds.download.DownloadConfig | None
) -> Iterator[Shard]:
    """Write the shards, by Beam if the download config names options or a runner, yielding each when it is complete."""
    if download_config is not None and (download_config.beam_options or download_config.beam_runner):
        _write_with_beam(shards, download_config)
        yield from shards
    elif workers <= 1 or len(shards) <= 1:
        for shard in shards:
            write_shard(shard)
            yield shard
    else:
        yield from _write_with_processes(shards, workers)


def _write_with_processes(shards: list[Shard], workers: int) -> Iterator[Shard]:
    """Use a pool of fresh processes (forking a process that has threads may hang)."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=context, initializer=_follow_parent)
    try:
        futures: dict[Future[None], Shard] = {pool.submit(write_shard, shard): shard for shard in shards}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BrokenProcessPool as error:
        raise BuildError(
            "expected the reading processes to finish, found one killed (out of memory?); "
            "complete shards are kept: run the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Exit when the parent is killed (workers are not notified), and leave keyboard interrupts to it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_with_beam(shards: list[Shard], download_config: tfds.download.DownloadConfig) -> None:
    """One Beam element per shard; reports come back through the file system that all workers share."""
    import apache_beam as beam

    try:
        with beam.Pipeline(runner=download_config.beam_runner, options=download_config.beam_options) as pipeline:
            _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.Map(write_shard)
    except Exception as error:  # runners rewrap worker exceptions in their own types and tracebacks
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BuildError(
            f"Apache Beam: {lines[-1].strip()}; complete shards are kept: run the same command again"
        ) from error


def skipped(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """What a build left out ("skipped": split, episode, reason) and what it repaired ("notes")."""
    path = directory / SKIPPED
    return json.loads(path.read_text()) if path.exists() else {"skipped": [], "notes": []}


def common(values: Iterable[Any]) -> Any:
    """The most frequent value, the first one in a tie; None if there is none."""
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: counts[value]) if counts else None
