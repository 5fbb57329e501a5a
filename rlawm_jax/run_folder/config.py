"""Configs from checkpoints: a field that is newer than a checkpoint gets the value that run was trained with.

A recipe's default may change, but an old run's settings may not. So every new field of configs/base.py or
configs/policy.py is entered below with the value that matches how the program behaved without it
(tests/run_folder/test_config.py checks this).
"""

import json
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlawm_jax.run_folder.logging import announce


class Fields(NamedTuple):
    """The fields of one kind of config: those of the first checkpoints by section, and those added since."""

    first: dict[str, str]
    added: dict[str, Any]

    def first_names(self) -> list[str]:
        """Dotted names of the fields that every checkpoint has."""
        return [f"{section}.{name}".lstrip(".") for section, names in self.first.items() for name in names.split()]


LOGGING = "tensorboard wandb wandb_project"
OPTIMIZER = "learning_rate weight_decay warmup_steps decay clip"
WORLD_MODEL = Fields(
    first={
        "": "seed dtype remat lpips_weights",
        "backbone": "name weights image_size",
        "rla": "num_tokens token_dim width depth heads mlp_ratio input_mode decoder_output decoder_only variational",
        "latent_scale": "value running",
        "denoiser": "action_dims width cond_depth flow_depth heads mlp_ratio token_embedding action_in_flow "
        "time_schedule",
        "image_decoder": "width",
        "objectives.image_decoder": "enabled start_step stop_step l1 ssim lpips max_images",
        "objectives.rla": "enabled start_step stop_step l1 mse kl",
        "objectives.denoiser": "enabled start_step stop_step l1 mse repeats",
        "optimizer": OPTIMIZER,
        "sampler": "solver steps",
        "data": "seed root groups val_episodes min_horizon max_horizon horizon_sampling stride min_num_frames source "
        "token_root action_statistics batch_size num_threads prefetch num_workers",
        "data.interaction": "prob distance movement buffer",
        "train": "steps log_every checkpoint_every keep_checkpoints init_from",
        "eval": "horizons chunk windows batch_size samples changed_threshold strips seed",
        "logging": LOGGING,
    },
    added={
        # as old as the rest, but it only describes where a run executes: a config without it means all devices
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        # likewise: every kernel computes the same formula
        "attention": "auto",
        "optimizer.name": "adamw",
        # every network, including the image decoder, was trained at the optimizer's learning rate
        "objectives.image_decoder.lr_scale": 1.0,
        "objectives.rla.lr_scale": 1.0,
        "objectives.denoiser.lr_scale": 1.0,
        "latent_scale.per_dimension": False,
        "image_decoder.stages": 4,
        "image_decoder.output_gain": 0.0,
        "objectives.image_decoder.adam_scale": 1.0,
        "objectives.rla.adam_scale": 1.0,
        "objectives.denoiser.adam_scale": 1.0,
        "objectives.image_decoder.mse": 0.0,
        "train.accumulate": 1,
        "train.keep_every": 0,
        "train.validate_every": 0,
        "train.on_nonfinite": "stop",
        "data.last_action": False,
        "data.mask_top": 0.0,
    },
)
POLICY = Fields(
    first={
        "": "seed dtype world_model observation",
        "observed": "image_size backbone image_decoder",
        "policy": "image_size widths blocks action_dim horizon executed hidden dropout state_dim state_hidden",
        "policy.rla": "enabled width depth heads queries position_embedding hidden latent_dim",
        "policy.residual": "enabled hidden critic_hidden mean_scale std_scale lora_rank lora_alpha",
        "loss": "rla_l1 rla_mse",
        "ema": "power max",
        "optimizer": f"name {OPTIMIZER}",
        "data": "seed root token_root demonstrations video val_episodes n_labelled labelled_fraction pad_after "
        "labelled_share shift batch_size",
        "train": "steps log_every checkpoint_every keep_checkpoints",
        "mesh": "data fsdp tensor",
        "logging": LOGGING,
    },
    added={
        "data.every": 1,
        "train.keep_every": 0,
        "train.on_nonfinite": "stop",
        "policy.resize": "antialias",  # the only way there was
    },
)


def config_from_meta(meta: dict[str, Any]) -> ConfigDict:
    """The locked config of a checkpoint; fields newer than the checkpoint get their old values, which are announced.

    Raises ValueError if any other field is missing.
    """
    config = ConfigDict(json.loads(meta["config"]))
    fields = POLICY if "policy" in config else WORLD_MODEL
    if missing := [name for name in fields.first_names() if not _has(config, name)]:
        raise ValueError(
            f"config of the checkpoint: expected {', '.join(missing)} as in every checkpoint, found nothing there; "
            f"load it with the version that wrote it ({meta.get('git', 'unknown')})"
        )
    added = {name: value for name, value in fields.added.items() if not _has(config, name)}
    for name, value in added.items():
        section, _, last = name.rpartition(".")
        _section(config, section)[last] = value
    if added:
        told = ", ".join(f"{name}={value}" for name, value in added.items())
        announce(
            f"the checkpoint's config is older than these fields, which get the values it was trained with: {told}"
        )
    return config.lock()


def _has(config: ConfigDict, name: str) -> bool:
    section, _, last = name.rpartition(".")
    inside = _section(config, section)
    return inside is not None and last in inside


def _section(config: ConfigDict, name: str) -> Any:
    """The section with a dotted name; None if there is none."""
    inside: Any = config
    for key in name.split(".") if name else ():
        inside = inside.get(key) if isinstance(inside, ConfigDict) else None
    return inside
