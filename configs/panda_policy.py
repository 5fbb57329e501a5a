"""Policies for the arm's tasks, cloned from demonstrations as decoded by a trained world model.

    python -m launch.train_policy --config=configs/panda_policy.py --workdir=runs/bc --config.world_model=runs/panda

The variants are those of configs/pusht_policy.py, with the same networks. The recipe clones `push`; another task is
`--config.data.demonstrations="('panda:mark',)"`, with `--config.data.video` likewise.
"""

from ml_collections import ConfigDict

from configs import pusht_policy

VARIANTS = pusht_policy.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/panda_policy.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}"
        )
    config = pusht_policy.get_config(variant)
    config.policy.action_dim = 3
    config.data.update({"demonstrations": ("panda:push",), "video": ("panda:push",)})
    if variant.endswith("demo"):
        # an arm that misses by a centimetre fails: twice the frames and steps of Push-T's demo
        config.data.every = 2
        config.train.steps = 1600
    return config
