"""Policies in use: run folders, the world model through whose eyes they look, and `Actor`, frames in, actions out.

A policy's checkpoint holds, under `frozen`, exactly what acts: averaged weights and normaliser limits. Training state
lies beside it and is not needed. A policy that was trained on pictures of a world model's image decoder acts on no
other: the decoder's fingerprint is stored and compared.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from rlawm_jax.backbone import fingerprint
from rlawm_jax.checkpoint import FROZEN, Checkpointer
from rlawm_jax.models.policy import Policy
from rlawm_jax.sharding import gather, make_mesh, replicated
from rlawm_jax.training.setup import load_world_model, provenance
from rlawm_jax.world_model import WorldModel

OBSERVATIONS = ("decoded", "raw")


def save_policy(workdir: str | Path, config: ConfigDict, policy: Policy, step: int, *, state: Any = None) -> None:
    """Write a checkpoint that `load_policy` reads; `state` is whatever its training needs to go on.

    `config` is the policy's own (of `load_policy`, `with_residual`): it says what the policy looks at.
    """
    checkpoints = Checkpointer(workdir)
    state = {"step": jnp.int32(step)} if state is None else state
    checkpoints.save(step, state, nnx.state(policy), {}, policy_meta(config))
    checkpoints.close()


def policy_meta(config: ConfigDict) -> dict[str, Any]:
    """What a policy's checkpoint says about itself."""
    return provenance(config) | {"fingerprint": config.observed.backbone}


def load_policy(workdir: str | Path, *, step: int | None = None) -> tuple[Policy, ConfigDict]:
    """(policy, config) of a run's newest checkpoint, or of `step`, on the first device of this process."""
    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        step = checkpoints.latest_intact() if step is None else step
        if step not in checkpoints.steps:
            raise FileNotFoundError(f"{workdir}: expected a checkpoint of step {step}, found {checkpoints.steps}")
        config = ConfigDict(json.loads(checkpoints.meta(step)["config"])).lock()
        if "policy" not in config:
            raise ValueError(
                f"{workdir}: expected the run folder of a policy, found a world model's; "
                f"train a policy with launch.train_policy --config.world_model={workdir}"
            )
        graphdef, skeleton = nnx.split(nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0))))
        place = replicated(make_mesh(1, 1, 1, jax.local_devices()[:1]))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), skeleton)
        return nnx.merge(graphdef, checkpoints.arrays(step, **{FROZEN: abstract})[FROZEN]), config
    finally:
        checkpoints.close()


class Eyes(NamedTuple):
    """The world model that a policy looks through, its config and the fingerprint of its backbone."""

    model: WorldModel
    config: ConfigDict
    fingerprint: str


def load_eyes(config: ConfigDict, *, needs: tuple[str, ...] = ()) -> Eyes | None:
    """The world model, backbone included, that repaints a policy's frames or that training needs `needs` of.

    None where frames are looked at as they are. One-line errors where the run is missing or lacks a trained part, and
    where its image decoder is not the one that the policy was trained with.
    """
    if config.observation not in OBSERVATIONS:
        raise ValueError(f"config.observation: expected one of {', '.join(OBSERVATIONS)}, found {config.observation!r}")
    decoded = config.observation == "decoded"
    needs = (*needs, "image_decoder") if decoded else needs
    if not needs:
        return None
    if not (config.world_model and (Path(config.world_model) / "checkpoints").is_dir()):
        raise FileNotFoundError(
            f"config.world_model: expected a world model's run folder with checkpoints/ (for its {', '.join(needs)}), "
            f"found {config.world_model or 'nothing'}; train one with launch.train and name it"
        )
    model, world_config, meta = load_world_model(config.world_model, with_backbone=True)
    if missing := [part for part in needs if part not in meta["trained_parts"]]:
        raise ValueError(
            f"config.world_model: expected a trained {', '.join(missing)} in {config.world_model}, "
            f"found {', '.join(meta['trained_parts'])} only"
        )
    if decoded:
        check_decoder(config, model)
    return Eyes(model, world_config, meta["fingerprint"])


def check_decoder(config: ConfigDict, model: WorldModel) -> None:
    """Refuse a world model whose pictures the policy was not trained on."""
    graphdef, state = nnx.split(model.image_decoder)
    expected, found = config.observed.image_decoder, fingerprint(nnx.merge(graphdef, gather(state)))
    if expected and expected != found:
        raise ValueError(
            f"config.world_model: expected the image decoder {expected} that the policy was trained with, "
            f"found {found} in {config.world_model}; train the policy again on this world model"
        )


def repaint(model: WorldModel, frames: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Frames through backbone and image decoder: RGB in [0, 1] as a policy meets it in imagination."""
    return model.decode(model.encode(frames))


class Actor:
    """A trained policy as a function from camera frames to raw actions; everything between is one jitted program.

    Chooses the mean, without chance. `image_size` is the side of the square frames it wants, `action_dim` and
    `executed` the shape of its answer.
    """

    def __init__(self, policy: Policy, config: ConfigDict, eyes: WorldModel | None) -> None:
        """`eyes` is the world model that repaints frames, or None where the policy looks at them as they are."""
        self.config = config
        self.image_size, self.action_dim, self.executed = config.observed.image_size, policy.action_dim, policy.executed
        graphdef, self._weights = nnx.split(policy)
        eyes_def, self._eyes = (None, None) if eyes is None else nnx.split(_without_dynamics(eyes))

        @jax.jit
        def act(weights, eyes, frames, state):
            policy = nnx.merge(graphdef, weights)
            images = frames / 255.0 if eyes_def is None else repaint(nnx.merge(eyes_def, eyes), frames)
            return policy.raw_actions(policy.best_actions(policy.features(images, state)))

        self._act = act

    @staticmethod
    def load(workdir: str | Path, *, step: int | None = None) -> "Actor":
        """The newest policy of a run folder (or that of `step`), with the world model it looks through."""
        policy, config = load_policy(workdir, step=step)
        eyes = load_eyes(config)
        return Actor(policy, config, eyes.model if eyes else None)

    def act(self, frames: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Raw actions [b, executed, a], float32, for RGB frames uint8 [b, h, w, 3]; compiled once per batch size.

        Where the dataset had foreground masks, the caller sets the background to 0. `state` [b, s] is raw, for policies
        that read it.
        """
        size = self.image_size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (size, size, 3):
            raise ValueError(
                f"frames: expected uint8 [b, {size}, {size}, 3] as in training, "
                f"found {frames.dtype} {list(frames.shape)}; render them at that size"
            )
        return np.asarray(self._act(self._weights, self._eyes, frames, state))


def _without_dynamics(model: WorldModel) -> WorldModel:
    """The parts that repaint a frame: what predicts the future stays behind."""
    graphdef, state = nnx.split(model)
    eyes: Any = nnx.merge(graphdef, state)
    eyes.rla = eyes.denoiser = None
    return eyes
