"""The smallest training run there is: the debug variant of the Push-T recipe on a dataset of drawn squares."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import pusht
from data import schema
from rlawm_jax.run_folder.logging import METRICS_FILE
from tests.data.conftest import Labelled

SIZE, LENGTH = 28, 12
EPISODES = (0, 1, 1000, 1001, 1002, 1003)  # the first two are held out in every recipe


class TinyPushT(Labelled, skip_registration=True):
    """The same episodes under both splits of the recipe."""

    name = "pusht"

    def _split_generators(self, dl_manager):
        return {"play": self._generate_examples(), "demo": self._generate_examples()}


def episode(episode_id: int) -> schema.Episode:
    """A bright square on noise follows a random walk; action t is where it is next."""
    rng = np.random.default_rng(episode_id)
    places = np.clip(np.cumsum(rng.integers(-3, 4, (LENGTH + 1, 2)), axis=0) + SIZE // 2, 0, SIZE - 8)
    frames = np.broadcast_to(rng.integers(0, 128, (SIZE, SIZE, 3), np.uint8), (LENGTH, SIZE, SIZE, 3)).copy()
    for frame, (row, column) in zip(frames, places, strict=False):
        frame[row : row + 8, column : column + 8] = 255
    positions = places[:-1].astype(np.float32)
    return schema.Episode(
        frames=frames,
        actions=places[1:].astype(np.float32),
        state=None,
        success=True,
        text="",
        episode_id=episode_id,
        robot_id=0,
        control_hz=10.0,
        foreground_mask=None,
        effector_position=positions,
        object_positions=positions[:, None],
    )


def write_dataset(root: Path) -> None:
    """Build it as root/pusht."""
    TinyPushT([episode(i) for i in EPISODES], data_dir=root).download_and_prepare()


def tiny_config(root: Path, **overrides) -> ConfigDict:
    """The debug recipe on the dataset in `root`, without TensorBoard; overrides as {"train.steps": 3}."""
    config = pusht.get_config("debug")
    config.data.update({"root": str(root), "token_root": str(root / "tokens")})
    config.logging.tensorboard = False
    config.lock()
    config.update_from_flattened_dict(overrides)
    return config


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without those that measure time."""
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if not any(name.startswith("time/") for name in line)]
