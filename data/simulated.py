"""Datasets of simulated worlds: committed traces, replayed by several processes and rendered at the requested size.

What `pusht` and `panda` share; their builders say what their world, splits and episodes are. Reading a built dataset
needs no simulator.
"""

import dataclasses
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from data.schema import Episode, EpisodeError, Spec, features, to_example
from data.traces import Trace, TraceFiles, World


@dataclasses.dataclass(eq=False)
class SimulatedConfig(tfds.core.BuilderConfig):
    """Image side in pixels, which splits and how many episodes of each (`None` for all), and by how many processes."""

    image_size: int = 112
    splits: tuple[str, ...] = ()
    limit: int | None = None
    workers: int = 1


def missing(world: str, error: ModuleNotFoundError) -> str:
    """What a person should install for a simulated world that cannot be imported."""
    fix = "pip install -r launch/requirements-demo.txt"
    newer = ' on Python 3.11; for newer ones see "Versions" in launch/README.md' if world == "panda" else ""
    return f"expected the package {error.name}, found none; {fix}{newer}"


class SimulatedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of a world's traces; subclasses give name, version and what follows."""

    texts: ClassVar[Mapping[str, str]]  # the instruction of every split
    sizes: ClassVar[Mapping[str, int]]  # the fields of Spec, but for the image's
    metadata: ClassVar[Mapping[str, Any]]
    files: ClassVar[TraceFiles]
    world: ClassVar[Callable[[int], World]]  # of an image size
    # (trace, world, split, index, recorded_with); EpisodeError if the world does not reproduce the trace
    episode: ClassVar[Callable[..., Episode]]

    @classmethod
    def config_of(
        cls, image_size: int, *, splits: str | None = None, limit: int | None = None, workers: int = 1
    ) -> SimulatedConfig:
        """The config, named after what it builds so that different builds live side by side; `splits` is "a,b".

        Raises EpisodeError for an unknown split.
        """
        chosen = tuple(cls.texts) if splits is None else tuple(splits.split(","))
        if unknown := [split for split in chosen if split not in cls.texts]:
            raise EpisodeError(f"--only: expected splits among {', '.join(cls.texts)}, found {', '.join(unknown)}")
        parts = [f"{image_size}px", *(chosen if splits else ()), *([f"first{limit}"] if limit else ())]
        return SimulatedConfig(name="_".join(parts), image_size=image_size, splits=chosen, limit=limit, workers=workers)

    @property
    def config(self) -> SimulatedConfig:
        """The builder's config."""
        assert isinstance(self.builder_config, SimulatedConfig)
        return self.builder_config

    @property
    def spec(self) -> Spec:
        """What all episodes have in common."""
        return Spec(image_size=(self.config.image_size, self.config.image_size), **self.sizes)

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = tfds.core.MetadataDict(self.metadata, image_size=self.config.image_size)
        return tfds.core.DatasetInfo(
            builder=self,
            description=sys.modules[type(self).__module__].__doc__,
            features=features(self.spec),
            metadata=metadata,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        recorded, recorded_with = self.files.load(self.files.folder / f"{split}.npz")
        jobs = [(trace, split, i, recorded_with) for i, trace in enumerate(recorded[: self.config.limit])]
        cls = type(self)
        render = functools.partial(_render, make=cls.world, episode=cls.episode, image_size=self.config.image_size)
        # spawned: a forked process would share the parent's threads
        with multiprocessing.get_context("spawn").Pool(min(self.config.workers, len(jobs))) as pool:
            done = pool.imap(render, jobs)
            for i, rendered in enumerate(tqdm(done, split, len(jobs), unit="episode")):
                yield i, to_example(rendered, f"{self.name} {split} episode {i}", self.spec)


@functools.cache
def _world(make: Callable[[int], World], image_size: int) -> World:
    """This process's only world."""
    return make(image_size)


def _render(
    job: tuple[Trace, str, int, dict[str, str]],
    make: Callable[[int], World],
    episode: Callable[..., Episode],
    image_size: int,
) -> Episode:
    trace, *about = job
    return episode(trace, _world(make, image_size), *about)
