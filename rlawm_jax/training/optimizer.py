"""The optimizer a config describes: AdamW (as in the release) or Muon, with optional warm-up, decay and clipping."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from rlawm_jax.sharding import path_name

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("constant", "cosine")
# root mean square of a Muon update in units of the learning rate, so that AdamW's rates carry over
MUON_RMS = 0.2


def make_schedule(config: ConfigDict, start_step: int, stop_step: int, lr_scale: float = 1.0) -> optax.Schedule:
    """The learning rate over a part's steps, counted from its first update (step 0) and ending at `stop_step`."""
    peak, warmup = config.learning_rate * lr_scale, config.warmup_steps
    if config.decay not in DECAYS:
        raise ValueError(f"config.optimizer.decay: expected one of {', '.join(DECAYS)}, found {config.decay!r}")
    if config.decay == "cosine":
        steps = stop_step - start_step
        if steps <= warmup:
            raise ValueError(
                f"config.optimizer.warmup_steps: expected fewer than the {steps} steps of the objective, found {warmup}"
            )
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    if warmup:
        return optax.linear_schedule(0.0, peak, warmup)
    return optax.constant_schedule(peak)


def make_optimizer(
    config: ConfigDict, start_step: int, stop_step: int, lr_scale: float = 1.0, adam_scale: float = 1.0
) -> optax.GradientTransformation:
    """The optimizer over the steps [start_step, stop_step); `config.clip` > 0 clips the part's gradient norm first.

    `adam_scale` multiplies the rate of the parameters that Muon leaves to AdamW.
    """
    schedule = make_schedule(config, start_step, stop_step, lr_scale)
    if config.name == "adamw":
        # optax's default betas and epsilon are those of torch: 0.9, 0.999, 1e-8
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    elif config.name == "muon":
        optimizer = muon(
            schedule,
            weight_decay=config.weight_decay,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=kernel_axes,
            adam_learning_rate=make_schedule(config, start_step, stop_step, lr_scale * adam_scale),
        )
    else:
        raise ValueError(f"config.optimizer.name: expected one of {', '.join(OPTIMIZERS)}, found {config.name!r}")
    # by the norm of the part, not of the model: it must not matter which other parts train
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer) if config.clip > 0 else optimizer


def kernel_axes(params: Any) -> Any:
    """The leaves Muon orthogonalises, and their matrix shapes: every kernel, inputs by outputs; AdamW takes the others.

    Linears [.., in, out], stacked over layers or not; convolutions [h, w, in, out] as (h w in) by out; transposed ones
    [in, 2, 2, out] as in by (4 out). The image decoder's last convolution stays with AdamW, as is usual for
    output layers with Muon.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = path_name(path)
        if "kernel" not in name or "/conv_out/" in name:
            return None
        if leaf.ndim in (2, 3):
            return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)
        if leaf.ndim == 4:
            first = (0,) if "/ups/" in name else (0, 1, 2)
            return MuonDimensionNumbers(first, tuple(i for i in range(4) if i not in first))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)
