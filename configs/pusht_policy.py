"""Policies for Push-T, cloned from demonstrations as decoded by a trained world model.

    python -m data.build pusht --data_dir=datasets --image_size=224
    python -m launch.train_policy --config=configs/pusht_policy.py --workdir=runs/bc --config.world_model=runs/pusht

| variant | for | world model | networks |
|---|---|---|---|
| (none) | one GPU, an hour | configs/pusht.py | ResNet-18 at 128 px, MLP 1024-512-256 |
| demo | two CPU cores, minutes | configs/pusht.py:demo | widths 16 to 128 at 64 px |
| rla, rla_demo | the same two | the same two | BC + RLA: actions of some episodes, video of the others |

How much is labelled: `--config.data.n_labelled=N` or `--config.data.labelled_fraction=0.05`.
"""

from ml_collections import ConfigDict

from configs import policy

VARIANTS = ("", "demo", "rla", "rla_demo")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/pusht_policy.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}"
        )
    config = policy.get_config()
    config.policy.update({"action_dim": 2, "resize": "antialias"})
    config.data.update({"demonstrations": ("pusht:demo",), "video": ("pusht:demo",), "batch_size": 64})
    config.data.val_episodes = 40  # of 150: the same ones that are held out from the world model
    config.train.update({"steps": 20_000, "checkpoint_every": 2_000})
    if variant.startswith("rla"):
        config.policy.rla.update({"enabled": True, "latent_dim": 16 * 32})
        config.optimizer.warmup_steps = 200
    if variant.endswith("demo"):
        _demo(config)
    return config


def _demo(config: ConfigDict) -> None:
    config.policy.update({"image_size": 64, "widths": (16, 32, 64, 128), "hidden": (256, 256)})
    config.policy.rla.update({"width": 64, "depth": 2, "heads": 4, "hidden": (256, 256), "latent_dim": 4 * 8})
    config.data.every = 4  # decoding takes most of the time
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50})
    config.train.update({"steps": 800, "checkpoint_every": 400, "keep_checkpoints": 1})
