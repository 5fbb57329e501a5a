"""Tiny datasets on disk whose frames and actions say which episode and frame they belong to."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from data import schema

NUM_EPISODES, VAL_EPISODES, SIZE = 8, 2, 8
LENGTHS = [12, 25, 12, 40, 6, 18, 25, 31]


class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Stores the episodes it is given under the name `labelled`."""

    VERSION = tfds.core.Version("1.0.0")
    name = "labelled"

    def __init__(self, episodes: list[schema.Episode], **kwargs) -> None:
        self._episodes = episodes
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=schema.features(schema.Spec.of(self._episodes[0])))

    def _split_generators(self, dl_manager):
        return {"play": self._generate_examples()}

    def _generate_examples(self):
        for episode in self._episodes:
            yield episode.episode_id, schema.to_example(episode, f"episode {episode.episode_id}")


def labelled_episode(
    episode_id: int, length: int, shift: int = 0, masked: bool = False, wide: bool = False
) -> schema.Episode:
    """Frame t is filled with (episode_id, t, shift); action t is [episode_id, t], far outside in unusable places.

    `wide` adds a third number to the actions, 7. The object sits at the effector and moves at frame 5 alone.
    """
    frames = np.zeros((length, SIZE, SIZE, 3), np.uint8)
    frames[..., 0], frames[..., 1], frames[..., 2] = episode_id, np.arange(length)[:, None, None], shift
    actions = np.stack([np.full(length, episode_id), np.arange(length)], axis=1).astype(np.float32)
    if wide:
        actions = np.pad(actions, ((0, 0), (0, 1)), constant_values=7)
    actions[-1] = 1e6  # the action after the last frame has no recorded effect
    mask = np.zeros((length, SIZE, SIZE), bool)
    mask[:, : SIZE // 2] = True
    objects = np.where(np.arange(length) < 5, 0.0, 0.1).astype(np.float32)[:, None, None].repeat(2, axis=2)
    return schema.Episode(
        frames=frames,
        actions=actions,
        state=None,
        success=True,
        text="",
        episode_id=episode_id,
        robot_id=episode_id % 2,
        control_hz=10.0,
        foreground_mask=mask if masked else None,
        effector_position=np.zeros((length, 2), np.float32),
        object_positions=objects,
    )


def write_labelled(root: Path, name: str, **kind) -> None:
    """Build a dataset as root/name; `kind` goes to `labelled_episode`."""
    episodes = [labelled_episode(i, LENGTHS[i], **kind) for i in range(NUM_EPISODES)]
    Labelled(episodes, data_dir=root / name).download_and_prepare()


@pytest.fixture(scope="session")
def labelled_root(tmp_path_factory) -> Path:
    """A root with the datasets `first` (frames only) and `second` (blue channel 1), `masked` and `wide`."""
    root = tmp_path_factory.mktemp("datasets")
    write_labelled(root, "first")
    write_labelled(root, "second", shift=1)
    write_labelled(root, "masked", masked=True)
    write_labelled(root, "wide", wide=True)
    return root


@pytest.fixture
def make_config(labelled_root, tmp_path) -> Callable:
    """make_config(datasets, **overrides) -> the locked data section for the labelled datasets."""

    def make(datasets=("first:play", "second:play"), **overrides):
        config = base.get_config().data
        config.groups = {"play": {"datasets": (), "weight": 1.0, "min_start_frame": 0}}
        config.horizon_sampling = "beta"
        config.interaction.prob = 0.9
        config.root = str(labelled_root)
        config.token_root = str(tmp_path / "tokens")
        config.groups.play.datasets = datasets
        config.val_episodes = VAL_EPISODES
        config.batch_size = 8
        config.lock()
        config.update(overrides)
        return config

    return make
