"""A world simple enough to know every answer: actions move the tokens, frames are the tokens themselves.

It stands in for data (`ToyLoader`) and for models (`ToyModel`), with the interfaces that evaluation and report use.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data.windows import DatasetWindows, Window, WindowGroup, validation_windows
from rlawm_jax.models.layers import Statistic
from rlawm_jax.rng import per_sample

GRID, PATCH, WIDTH, FRAMES = (4, 4), 4, 6, 24
LATENT = (2, 3)


def toy_config(**overrides) -> ConfigDict:
    """Only the fields that evaluation and report read."""
    evaluation = {
        "horizons": (4, 9),
        "chunk": 4,
        "windows": 12,
        "batch_size": 5,
        "samples": 3,
        "changed_threshold": 0.004,
        "strips": 2,
        "seed": 7,
    }
    return ConfigDict(
        {
            "seed": 0,
            "sampler": {"solver": "euler", "steps": 2},
            "data": {"max_horizon": 5, "stride": 1, "last_action": False},
            "eval": evaluation | overrides,
        }
    )


class ToyLoader:
    """Episodes in memory: an action [a] moves channel a mod 3 of patch a // 3 by 8/255; frames are decoded tokens."""

    def __init__(
        self, episodes: int = 6, *, with_frames: bool = True, still: tuple[int, ...] = (), described: bool = True
    ):
        rng = np.random.default_rng(0)
        self.described = described  # whether it says which patches move and which action holds still
        self.with_frames = with_frames
        self.reference, self.episode_ids = "toy:play", np.arange(episodes)
        self._actions = np.zeros((episodes, FRAMES, 1), np.float32)
        self._actions[..., 0] = rng.integers(0, 48, (episodes, FRAMES))
        self._actions[list(still)] = -1  # no patch: nothing moves
        base = rng.integers(0, 64, (episodes, 1, 16, WIDTH)) / 255.0
        steps = np.stack([[move(a) for a in episode[:-1, 0]] for episode in self._actions])
        drift = np.concatenate([np.zeros((episodes, 1, 16, WIDTH)), np.cumsum(steps, axis=1)], axis=1)
        self.tokens = (base + drift).astype(np.float32)

    def store_of(self, window: Window) -> "ToyLoader":
        return self

    def validation_windows(self, horizon: int, count: int, *, seed: int = 0) -> list[Window]:
        episodes = len(self.tokens)
        dataset = DatasetWindows(np.arange(episodes), np.full(episodes, FRAMES), [[]] * episodes)
        return validation_windows([WindowGroup("toy", [dataset])], horizon, count, seed=seed)

    def robot_of(self, window: Window) -> int:
        return 0

    def actions(self, window: Window, count: int) -> np.ndarray:
        return self._actions[window.episode, window.start : window.start + count]

    def hold_still(self, window: Window) -> np.ndarray | None:
        return np.full(1, -1, np.float32) if self.described else None

    def moving_patches(self, window: Window, positions, grid) -> np.ndarray:
        """Where it is described, the patches that change."""
        ends = self.tokens[window.episode, [window.start + i for i in positions]]
        changed = (ends != self.tokens[window.episode, window.start]).any(axis=-1)
        return changed & self.described

    def load_window(self, window: Window, positions=None) -> dict[str, np.ndarray]:
        positions = range(window.horizon) if positions is None else positions
        where = [window.start + i for i in positions]
        tokens = self.tokens[window.episode, where]
        rows = slice(window.start, window.start + window.horizon - 1)
        out = {
            "tokens": tokens,
            "actions": self._actions[window.episode, rows],
            "robot_id": np.int32(0),
            "num_actions": np.int32(window.horizon - 1),
            "horizon": np.int32(window.horizon),
        }
        if self.with_frames:
            out["frames"] = np.round(np.asarray(decode_tokens(tokens)) * 255).astype(np.uint8)
        return out


def move(action: float) -> np.ndarray:
    """What one action adds to the tokens."""
    step = np.zeros((16, WIDTH))
    if action >= 0:
        step[int(action) // 3, int(action) % 3] = 8 / 255
    return step


def decode_tokens(tokens):
    """Tokens as a frame: the first three channels, one square per patch."""
    image = tokens[..., :3].reshape(-1, *GRID, 3)
    return jnp.clip(jnp.repeat(jnp.repeat(image, PATCH, axis=1), PATCH, axis=2), 0.0, 1.0)


class ToyRla(nnx.Module):
    """An autoencoder whose latent carries the mean change only."""

    def encode(self, s0, s1):
        return jnp.broadcast_to((s1 - s0).mean(axis=(1, 2))[:, None, None], (len(s0), *LATENT))

    def decode(self, s0, z):
        return s0 + z.mean(axis=(1, 2))[:, None, None]


class ToyModel(nnx.Module):
    """Obeys the actions exactly, then adds `noise_scale` times the mean of its noise to every token."""

    def __init__(self, noise_scale: float = 0.0):
        self.grid = GRID
        self.backbone = None
        self.noise_scale = noise_scale
        self.latent_scale = Statistic(jnp.asarray(2.0))
        self.rla = ToyRla()

    def noise(self, key, ids):
        return jax.vmap(lambda k: jax.random.normal(k, LATENT))(per_sample(key, ids))

    def latent(self, s0, s1):
        return self.rla.encode(s0, s1) / self.latent_scale[...]

    def apply_latent(self, s0, x0):
        return self.rla.decode(s0, self.raw_latent(x0))

    def raw_latent(self, x0):
        return self.latent_scale[...] * x0

    def predict(self, tokens, actions, num_actions, robot_id, noise, sampler):
        table = jnp.asarray(np.stack([move(a) for a in range(48)] + [move(-1)]), jnp.float32)
        valid = jnp.arange(actions.shape[1]) < num_actions[:, None]
        rows = jnp.where(valid, actions[..., 0].astype(int), -1)
        after = tokens + table[rows].sum(axis=1) + self.noise_scale * noise.mean(axis=(1, 2))[:, None, None]
        return after, self.latent(tokens, after)

    def decode(self, tokens):
        return decode_tokens(tokens)
