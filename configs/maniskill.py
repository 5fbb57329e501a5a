"""The release's recipes on its ManiSkill data, one stage per run; sizes are those of configs/base.py.

    python -m data.build maniskill --source=RELEASE/data/maniskill --data_dir=datasets --image_size=512
    python -m launch.train --config=configs/maniskill.py:image_decoder --workdir=runs/maniskill/image_decoder
    python -m launch.train --config=configs/maniskill.py:rla_32x64 --workdir=runs/maniskill/rla_32x64
    python -m launch.train --config=configs/maniskill.py:panda --workdir=runs/maniskill/panda

Each needs `--config.backbone.weights=DINOV3_DIR`. To get decoded images, pass the image decoder to the RLA run as
`--config.train.init_from=runs/maniskill/image_decoder`: world models take both from the RLA run.

| variant | stage | data | gap in frames | batch |
|---|---|---|---|---|
| panda, xarm, ur10e | a robot's denoiser, on the RLA of rla_32x64 | its two tasks | 2 to 15, biased long | 64 |
| rla_32x64, rla_8x8 | RLA | all tasks, and play at half the weight | 2 to 100, uniform | 128 |
| rla_32x64_play | RLA | play only, every episode | 2 to 100, biased long | 128 |
| image_decoder | image decoder | as rla_32x64 (the release does not say) | | 32 |

The release trains on four 48 GB GPUs for about three days a stage, and stops RLA and denoiser at about 100,000 steps.
"""

from ml_collections import ConfigDict

from configs import _release as release
from data.release import ROBOTS, play, ppo

WORLD_MODELS = tuple(ROBOTS)
LATENTS = {"rla_32x64": (32, 64), "rla_8x8": (8, 8), "rla_32x64_play": (32, 64)}
VARIANTS = (*WORLD_MODELS, *LATENTS, "image_decoder")
# initial frames in which an arm only moves to its work area
PLAY_START = 25


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    objective = "denoiser" if variant in WORLD_MODELS else "rla" if variant in LATENTS else "image_decoder"
    config = release.stage("configs/maniskill.py", variant, VARIANTS, objective)
    config.denoiser.action_dims = {str(robot.robot_id): robot.joints for robot in ROBOTS.values()}
    config.data.interaction.prob = 0.9
    config.data.groups = {f"ppo_{robot}": release.group(ppo(robot)) for robot in ROBOTS}
    if variant in WORLD_MODELS:
        _world_model(config, variant)
        return config
    config.data.groups.update(_play(0.5))
    release.rla(
        config, LATENTS.get(variant, LATENTS["rla_32x64"]), 100, 128, accumulate=2 if variant == "rla_8x8" else 1
    )
    if variant == "rla_32x64_play":
        config.data.groups = _play(1.0)
        config.data.update({"val_episodes": 0, "horizon_sampling": "beta"})  # validated on the tasks, never on play
    elif variant == "image_decoder":
        release.image_decoder(config)
    return config


def _world_model(config: ConfigDict, robot: str) -> None:
    config.denoiser.action_dims = {str(ROBOTS[robot].robot_id): ROBOTS[robot].joints}
    config.data.horizon_sampling = "beta"
    config.data.groups = {
        "ppo": release.group(ppo(robot)),
        "play": release.group(play(robot), weight=0.0, min_start_frame=PLAY_START),
    }
    config.train.init_from = "runs/maniskill/rla_32x64"


def _play(weight: float) -> dict:
    return {f"play_{robot}": release.group(play(robot), weight=weight, min_start_frame=PLAY_START) for robot in ROBOTS}
