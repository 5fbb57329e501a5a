"""A world whose best policy is known: a token is a point in the plane, and a chunk moves it by the sum of its rows.

Demonstrations walk straight on, each by its own step; the reward compares the imagined point with the demonstration's.
A policy that repeats the demonstration's displacement has reward 0; `ToyPolicy`'s base is off by `bias`, which costs
mean(bias^2) after one chunk (metric l2) and grows as the errors add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlawm_jax.flow import Sampler
from rlawm_jax.rl.demonstrations import Demonstrations
from rlawm_jax.rl.env import EnvSpec
from rlawm_jax.rng import per_sample

CHUNK, FRAMES, EPISODES = 2, 9, 6
BIAS = (0.06, -0.04, 0.0)
SPEC = EnvSpec(
    chunk=CHUNK,
    max_chunks=3,
    initial_prob=0.5,
    metric="l2",
    reward_scale=5.0,
    success_threshold=1e-4,
    observation_size=1,
    sampler=Sampler("euler", 1),
)
STEP = 0.1  # of every demonstration, per frame, in the first channel


class ToyWorld(nnx.Module):
    """Tokens [b, 1, 3] drift by the sum of the actions, plus `noise` times a draw."""

    def __init__(self, noise: float = 0.0):
        self.scale = nnx.Param(jnp.ones(()))
        self.noise_scale = noise

    def noise(self, key, ids):
        return jax.vmap(lambda k: jax.random.normal(k, (1, 3)))(per_sample(key, ids))

    def predict(self, tokens, actions, num_actions, robot_id, noise, sampler):
        moved = self.scale[...] * actions.sum(axis=1)[:, None]
        return tokens + moved + self.noise_scale * noise, noise

    def decode(self, tokens):
        return tokens[:, :, None]

    def encode(self, frames):
        return frames[:, 0, 0, None].astype(jnp.float32) / 255.0


class ToyPolicy(nnx.Module):
    """The interface of `Policy`; the base repeats the demonstrations' step, off by `bias` per chunk."""

    def __init__(self, bias=BIAS):
        self.base = nnx.Param(
            jnp.tile(jnp.array([STEP, 0.0, 0.0]), (CHUNK, 1)).reshape(-1) + jnp.tile(_per_row(bias), CHUNK)
        )
        self.mean, self.std = nnx.Param(jnp.zeros((4, 3 * CHUNK))), nnx.Param(jnp.zeros(3 * CHUNK))
        self.critic = nnx.Param(jnp.zeros((4, 1)))

    def features(self, images):
        flat = images.reshape(len(images), -1)
        return jnp.concatenate([flat, jnp.ones((len(images), 1))], axis=1)

    def distribution(self, features):
        mean = jax.lax.stop_gradient(self.base[...]) + 0.1 * jnp.tanh(features @ self.mean[...])
        return mean, jnp.broadcast_to(0.1 * jax.nn.softplus(self.std[...]), mean.shape)

    def value(self, features):
        return (features @ self.critic[...])[:, 0]

    def raw_actions(self, actions):
        return actions


def _per_row(bias):
    return jnp.array(bias) / CHUNK


def toy_trainable(path, value):
    return isinstance(value, nnx.Param) and path[0] != "base"


def demonstrations(
    shape=(1, 3), episodes: int = EPISODES, frames: int = FRAMES, actions=(), still=()
) -> Demonstrations:
    """Episodes that start at different heights and walk along the first channel."""
    start = np.linspace(0, 0.5, episodes)
    points = np.zeros((episodes, frames, 1, 3), np.float32)
    points[..., 0] = (STEP * np.arange(frames))[None, :, None]
    points[..., 1] = start[:, None, None]
    flat = points.reshape(-1, 1, 3)
    return Demonstrations(
        lengths=np.full(episodes, frames),
        robot_ids=np.zeros(episodes, int),
        shape=shape,
        read=lambda which: flat[np.asarray(which)],
        actions=actions,
        still=still,
    )
