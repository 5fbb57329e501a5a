"""Every field of a policy recipe at the official values: ResNet-18 with GroupNorm at 128 px, 12 actions, 8 executed.

Recipes start from `get_config()` here and change what they need; nothing reads a field that is not set here.
"""

from ml_collections import ConfigDict, FieldReference

from configs import base

NOT_OURS = ("init_from", "accumulate", "validate_every")  # fields of the world model's `train`


def get_config() -> ConfigDict:
    """The official behaviour cloning recipe without its data."""
    seed, shared = FieldReference(0), base.get_config()
    return ConfigDict(
        {
            "seed": seed,  # for parameters, dropout, batches and the choice of labelled episodes
            "dtype": "float32",  # of matmuls: float32 | bfloat16
            # run folder of the world model whose image decoder decodes the frames, and whose RLA encoder gives targets
            "world_model": "",
            # decoded: frames pass the backbone and the image decoder first, as in imagination | raw: as recorded
            "observation": "decoded",
            # written by training: the policy's input size, and the backbone and image decoder behind its images
            "observed": {"image_size": 0, "backbone": "", "image_decoder": ""},
            "policy": policy(),
            "loss": {"rla_l1": 0.05, "rla_mse": 0.05},  # weights relative to the action loss's 1 (BC + RLA only)
            "ema": {"power": 0.75, "max": 0.9999},  # averaged weights are the ones validated, saved and used to act
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-4,
                "weight_decay": 1e-4,
                "warmup_steps": 500,
                "decay": "cosine",
                "clip": 0.0,
            },
            "data": {**data(), "seed": seed},
            "train": {name: value for name, value in shared.train.items() if name not in NOT_OURS},
            "mesh": shared.mesh,
            "logging": shared.logging,
        }
    )


def policy() -> dict:
    """The networks."""
    return {
        "image_size": 128,  # frames are resized to this
        "resize": "release",  # release (bilinear without antialiasing) | antialias (ours)
        "widths": (64, 128, 256, 512),
        "blocks": (2, 2, 2, 2),
        "action_dim": 9,
        "horizon": 12,  # predicted rows
        "executed": 8,  # rows executed before the next observation
        "hidden": (1024, 512, 256),
        "dropout": 0.1,
        "state_dim": 0,  # 0: the policy does not read the robot's state
        "state_hidden": (256, 256),
        "rla": {  # queries read the image, and a second head predicts the latent action (BC + RLA)
            "enabled": False,
            "width": 256,
            "depth": 6,
            "heads": 8,
            "queries": 16,
            "position_embedding": False,  # ours: for the spatial tokens
            "hidden": (2048, 2048),
            "latent_dim": 2048,  # rla.num_tokens x rla.token_dim of the world model
        },
        "residual": {"enabled": False, **residual()},  # set by reinforcement learning from its own recipe
    }


def residual() -> dict:
    """What reinforcement learning adds to a cloned policy and trains: heads and low-rank branches."""
    return {
        "hidden": (512, 256),
        "critic_hidden": (256, 128),
        "mean_scale": 0.1,
        "std_scale": 0.1,
        "lora_rank": 8,  # 0: no low-rank branches
        "lora_alpha": 16.0,
    }


def data() -> dict:
    """Which episodes are used for what."""
    return {
        "root": "datasets",
        "token_root": "datasets/tokens",
        "demonstrations": (),  # "name:split" of the episodes whose actions are cloned
        "video": (),  # "name:split" of further episodes, used without their actions (BC + RLA only)
        "val_episodes": 10,  # ids below this are held out, in every dataset
        "n_labelled": 0,  # demonstrations whose actions are known, drawn by the seed; 0: labelled_fraction of them
        "labelled_fraction": 1.0,  # the others are video (BC + RLA) or unused (BC)
        "pad_after": 7,  # how far a chunk may reach beyond the end of its episode; the last row is repeated
        "every": 1,  # ours: chunks start at every n-th frame, and only those are decoded; 1 as released
        "labelled_share": 0.5,  # of a batch, where there is video
        "shift": 0,  # ours: random image shift by up to this many of the policy's pixels; 0 as released
        "batch_size": 32,
    }
