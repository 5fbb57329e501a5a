"""A robot arm that fills the frame and pushes a cube: the same program as the official recipe, at three sizes.

    python -m data.build panda --data_dir=datasets --image_size=224
    python -m launch.train --config=configs/panda.py --workdir=runs/panda

The variants are those of configs/pusht.py, with the same networks.
"""

from ml_collections import ConfigDict

from configs import pusht

VARIANTS = pusht.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/panda.py: expected a variant among {', '.join(VARIANTS[1:])}, found {variant!r}")
    config = pusht.get_config(variant)
    config.denoiser.action_dims = {"0": 3}
    config.data.action_statistics = "none"  # raw rows are in [-1, 1] already
    config.data.interaction.prob = 0.0  # the arm moves in every window
    config.data.groups = {"play": {"datasets": ("panda:play",), "weight": 1.0, "min_start_frame": 0}}
    return config
