"""A policy's observation model: the world model whose backbone and image decoder process frames for the policy.

A policy trained on frames decoded by one image decoder must not act on another's: the decoder's fingerprint is stored
with the policy and compared.
"""

from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rlawm_jax.models.policy import resized
from rlawm_jax.sharding import gather
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.backbone import fingerprint
from rlawm_jax.world_model import WorldModel

OBSERVATIONS = ("decoded", "raw")


class ObservationModel(NamedTuple):
    """The world model that processes a policy's frames, its config and the fingerprint of its backbone."""

    model: WorldModel
    config: ConfigDict
    fingerprint: str


def load_observation_model(config: ConfigDict, *, needs: tuple[str, ...] = ()) -> ObservationModel | None:
    """The world model, with backbone, that a policy's frames pass through or whose parts `needs` training requires.

    None where frames are used unchanged. One-line errors where the run is missing or lacks a trained part, and where
    its image decoder is not the one the policy was trained with.
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
    return ObservationModel(model, world_config, meta["fingerprint"])


def check_decoder(config: ConfigDict, model: WorldModel) -> None:
    """Reject a world model whose decoded frames the policy was not trained on."""
    graphdef, state = nnx.split(model.image_decoder)
    expected, found = config.observed.image_decoder, fingerprint(nnx.merge(graphdef, gather(state)))
    if expected and expected != found:
        raise ValueError(
            f"config.world_model: expected the image decoder {expected} that the policy was trained with, "
            f"found {found} in {config.world_model}; train the policy again on this world model"
        )


def decoded(model: Any, tokens: Float[Array, "b l c"], size: int, resize: str) -> Float[Array, "b s s 3"]:
    """What a policy sees of tokens, recorded or imagined: the decoded frame, RGB in [0, 1], at the policy's size.

    Cloning, imagination and acting all use it. `model` needs `decode`; `size` and `resize` are the policy's.
    """
    return resized(model.decode(tokens), size, resize)
