"""The optimizer a config describes: AdamW, optional warm-up, decay and clipping. One per trained part."""

import optax
from ml_collections import ConfigDict

DECAYS = ("constant", "cosine")


def make_schedule(config: ConfigDict, start_step: int, stop_step: int) -> optax.Schedule:
    """The learning rate over a part's own steps (its first update is step 0), which last to `stop_step`."""
    peak, warmup = config.learning_rate, config.warmup_steps
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


def make_optimizer(config: ConfigDict, start_step: int, stop_step: int) -> optax.GradientTransformation:
    """AdamW over the steps [start_step, stop_step); `config.clip` > 0 clips the part's global gradient norm first."""
    adamw = optax.adamw(make_schedule(config, start_step, stop_step), weight_decay=config.weight_decay)
    if config.clip > 0:
        return optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    return adamw
