"""Helpers shared by the release's recipes, which train one stage per run."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs import base

STAGES = ("image_decoder", "rla", "denoiser")


def stage(config_file: str, variant: str, variants: Iterable[str], objective: str) -> ConfigDict:
    """configs/base.py with one objective switched on; ValueError for a variant that `config_file` does not have."""
    if variant not in variants:
        raise ValueError(f"{config_file}: expected a variant among {', '.join(variants)}, found {variant!r}")
    config = base.get_config()
    for name in STAGES:
        config.objectives[name].enabled = name == objective
    return config


def rla(config: ConfigDict, latent: tuple[int, int], max_horizon: int, batch_size: int, accumulate: int) -> None:
    """The RLA autoencoder for a latent of size (tokens, width), trained on gaps of up to `max_horizon` frames."""
    config.rla.update({"num_tokens": latent[0], "token_dim": latent[1]})
    config.data.update({"max_horizon": max_horizon, "batch_size": batch_size})
    config.train.accumulate = accumulate


def image_decoder(config: ConfigDict) -> None:
    """32 frames per step at a tenth of the learning rate; the published decoder is from step 60,000."""
    config.data.batch_size = 32
    config.train.update({"steps": 60_000, "checkpoint_every": 5_000})


def group(datasets: tuple[str, ...], *, weight: float = 1.0, min_start_frame: int = 0) -> dict[str, Any]:
    """One entry of config.data.groups."""
    return {"datasets": datasets, "weight": weight, "min_start_frame": min_start_frame}
