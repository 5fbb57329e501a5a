"""A robot arm that fills the frame and pushes a cube: the same program as the official recipe, at three sizes.

    python -m data.build panda --data_dir=datasets --image_size=224
    python -m launch.train --config=configs/panda.py --workdir=runs/panda

The variants are those of configs/pusht.py, with the same networks. What `demo` changes was measured on this world:
configs/README.md has the table.
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
    if variant == "demo":
        _demo(config)
    return config


def _demo(config: ConfigDict) -> None:
    # twice the windows cost a denoiser step a quarter more time: Muon's share does not grow with them
    config.data.batch_size = 32
    # rollouts and plans predict whole chunks, the longest windows
    config.data.horizon_sampling = "beta"
    config.objectives.rla.update({"stop_step": 1500, "lr_scale": 1.4})
    config.objectives.denoiser.start_step = 1500
    config.train.update({"steps": 4200, "checkpoint_every": 700})
    config.objectives.image_decoder.max_images = 1
    config.image_decoder.update({"width": 96, "stages": 3})  # it paints 64 pixels of 112, as many as policies see
    config.sampler.steps = 4  # as accurate as 30 at this size
