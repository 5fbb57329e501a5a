"""`Actor`: a trained policy as a function from camera frames to raw actions."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.models.policy import Policy
from rlawm_jax.policy.checkpoint import load_policy
from rlawm_jax.policy.observation import decoded, load_observation_model
from rlawm_jax.world_model import WorldModel


class Actor:
    """A trained policy as a function from camera frames to raw actions; everything between is one jitted program.

    Deterministic: it returns the mean action. `image_size` is the side of the square frames it expects, `action_dim`
    and `executed` the shape of its output.
    """

    def __init__(self, policy: Policy, config: ConfigDict, observer: WorldModel | None) -> None:
        """`observer` is the world model that frames pass through, or None where they are used unchanged."""
        self.config = config
        self.image_size, self.action_dim, self.executed = config.observed.image_size, policy.action_dim, policy.executed
        graphdef, self._weights = nnx.split(policy)
        observer_def, self._observer = (None, None) if observer is None else nnx.split(_without_dynamics(observer))

        @jax.jit
        def act(weights, observer, frames, state):
            policy = nnx.merge(graphdef, weights)
            images = frames / 255.0
            if observer_def is not None:
                model = nnx.merge(observer_def, observer)
                images = decoded(model, model.encode(frames), policy.image_size, policy.resize)
            return policy.raw_actions(policy.best_actions(policy.features(images, state)))

        self._act = act

    @staticmethod
    def load(workdir: str | Path, *, step: int | None = None) -> "Actor":
        """The newest policy of a run folder (or that of `step`), with its observation model."""
        policy, config = load_policy(workdir, step=step)
        observer = load_observation_model(config)
        return Actor(policy, config, observer.model if observer else None)

    def act(self, frames: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Raw actions [b, executed, a], float32, for RGB frames uint8 [b, h, w, 3]; compiled once per batch size.

        Where the dataset had foreground masks, the caller must set the background to 0. `state` [b, s] is raw, for
        policies that use it.
        """
        size = self.image_size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (size, size, 3):
            raise ValueError(
                f"frames: expected uint8 [b, {size}, {size}, 3] as in training, "
                f"found {frames.dtype} {list(frames.shape)}; render them at that size"
            )
        return np.asarray(self._act(self._weights, self._observer, frames, state))


def _without_dynamics(model: WorldModel) -> WorldModel:
    """Only the backbone and image decoder, without the parts that predict the future."""
    graphdef, state = nnx.split(model)
    observer: Any = nnx.merge(graphdef, state)
    observer.rla = observer.denoiser = None
    return observer
