"""The release's recipes on the data of the interactive world simulator, one stage per run; sizes of configs/base.py.

    python -m data.build iws --source=RELEASE/data/iws_converted --data_dir=datasets --image_size=512
    python -m launch.train --config=configs/iws.py:image_decoder --workdir=runs/iws/image_decoder
    python -m launch.train --config=configs/iws.py:rla_32x64 --workdir=runs/iws/rla_32x64
    python -m launch.train --config=configs/iws.py:box --workdir=runs/iws/box

Each needs `--config.backbone.weights=DINOV3_DIR`. To get decoded images, pass the image decoder to the RLA run as
`--config.train.init_from=runs/iws/image_decoder`: world models take both from the RLA run.

| variant | stage | data | gap in frames | batch |
|---|---|---|---|---|
| box, rope | denoiser, 12 + 12 blocks, on the RLA of runs/iws/rla_32x64 | the task | 2 to 15, uniform | 48 |
| pusht | the same, on the RLA of runs/iws/rla_32x64_pusht_only | the task | 2 to 15, uniform | 64 |
| rla_32x64 | RLA | all six tasks, equal weights | 2 to 200, uniform | 128 |
| rla_32x64_pusht_only | RLA | pusht | 2 to 200, uniform | 126 |
| image_decoder | image decoder | as rla_32x64 (the release does not say) | | 32 |

Evaluation is over 60 frames. As in the release, denoisers read one more action row than elsewhere (the one issued at
the window's last frame), and the RLA on six tasks treats the top quarter of every frame as background.
"""

from ml_collections import ConfigDict

from configs import _release as release
from data.release import IWS_TASKS, iws

# variant -> task, width of its action rows, batch size, RLA run
WORLD_MODELS = {
    "pusht": ("pusht", 4, 64, "rla_32x64_pusht_only"),
    "box": ("bimanual_box", 14, 48, "rla_32x64"),
    "rope": ("bimanual_rope", 8, 48, "rla_32x64"),
}
RLAS = {"rla_32x64": (IWS_TASKS, 128, 1), "rla_32x64_pusht_only": (("pusht",), 126, 3)}
VARIANTS = (*WORLD_MODELS, *RLAS, "image_decoder")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of a variant; the launcher locks it against misspelt overrides."""
    objective = "denoiser" if variant in WORLD_MODELS else "rla" if variant in RLAS else "image_decoder"
    config = release.stage("configs/iws.py", variant, VARIANTS, objective)
    config.eval.horizons = (60,)
    if variant in WORLD_MODELS:
        task, width, batch_size, rla = WORLD_MODELS[variant]
        config.data.groups = {task: release.group(iws(task))}
        config.denoiser.update({"cond_depth": 12, "flow_depth": 12})
        config.denoiser.action_dims = {"0": width}
        config.data.update({"batch_size": batch_size, "last_action": True})
        config.train.init_from = f"runs/iws/{rla}"
        return config
    tasks, batch_size, accumulate = RLAS.get(variant, RLAS["rla_32x64"])
    config.data.groups = {task: release.group(iws(task)) for task in tasks}
    config.denoiser.action_dims = {"0": 4}  # not trained here; tasks differ, and 4 is the narrowest
    release.rla(config, (32, 64), 200, batch_size, accumulate)
    if variant == "rla_32x64":
        config.data.mask_top = 0.25
    elif variant == "image_decoder":
        release.image_decoder(config)
    return config
