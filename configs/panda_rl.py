"""PPO inside the arm's world model, rewarded by how close imagined tokens are to a demonstration's.

    python -m launch.train_rl --config=configs/panda_rl.py --workdir=runs/panda_rl --config.policy=runs/bc

The variants are those of configs/pusht_rl.py.
"""

from ml_collections import ConfigDict

from configs import pusht_rl

VARIANTS = pusht_rl.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/panda_rl.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}")
    config = pusht_rl.get_config(variant)
    config.bank.datasets = ("panda:push",)
    # as rlawm_jax/sim/panda.py clips
    config.env.update({"action_low": (-1.0, -1.0, -1.0), "action_high": (1.0, 1.0, 1.0)})
    if variant == "demo":
        config.sampler.steps = 4  # as in configs/panda.py
    return config
