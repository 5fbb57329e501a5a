"""Run folders as the release leaves them: files by step, and a config.yaml with paths of the authors' machine."""

from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from rlawm_jax.convert.release import state_dicts
from rlawm_jax.world_model import WorldModel

STEP = 20
THERE = "/home/author/rla-wm/runs/weights"  # what the paths in config.yaml begin with
FOLDERS = {
    "image_decoder": "image_decoder/maniskill/20260404_22-53-36",
    "rla": "rla/maniskill/20260323_21-41-25",
    "denoiser": "rla_wm/maniskill/20260410_10-00-00",
}
# what config.yaml says where weights do not, for the sizes of tests/tiny_models.py
SETTINGS: dict[str, dict[str, Any]] = {
    "image_decoder": {"models": {"decoder": {"args": {"channels": 128}}}, "lr": "1e-5"},
    "rla": {
        "models": {
            "encoder": {"args": {"num_heads": 4, "num_blocks": 1, "mlp_ratio": 4.0, "num_tokens": 3}},
            "decoder": {"args": {"num_heads": 4, "num_blocks": 1, "mlp_ratio": 4.0, "num_tokens": 3}},
        },
        "trainer": {"image_decoder": f"{THERE}/{FOLDERS['image_decoder']}", "max_steps": "1e6"},
        "dataset": {"horizon": [2, 100], "nonlinear_sampling": False},
    },
    "denoiser": {
        "models": {
            "encoder": {"args": {"num_heads": 4}},
            "flow_model": {
                "args": {
                    "num_heads": 8,
                    "num_cond_blocks": 1,
                    "num_flow_blocks": 1,
                    "robot_qpos_dims": {"0": 2, "2": 3},
                    "max_horizon": 5,
                    "use_task_horizon_embedding": False,
                }
            },
        },
        "trainer": {
            "encoder_ckpt": f"{THERE}/{FOLDERS['rla']}/ckpts/encoder_step0100000.pt",
            "image_decoder_dir": f"{THERE}/{FOLDERS['image_decoder']}",
            "latent_scalar_normalization": 10,
            "lambda_l1": 1,
            "batch_split": 2,
        },
        "optimizer": {"args": {"lr": "1e-4", "weight_decay": 0.0}},
        "batch_size": 48,
        "dataset": {
            "horizon": [2, 5],
            "interaction_prob": 0.9,
            "start_traj_id": 10,
            "groups": {
                "ppo": {"paths": ["ppo/panda/PullCube-v2/*"], "w": 1},
                "play": {"paths": ["play/panda/TableOnly-v2/*"], "w": 0.0, "min_start_frame": 25},
            },
        },
        "val_dataset": {"horizon": [4, 5], "groups": {"ppo": {"paths": ["ppo/panda/PullCube-v2/*"]}}},
    },
}


def write_run(kind: str, root: Path, model: WorldModel, config: ConfigDict, settings: dict | None = None) -> Path:
    """The run of `kind` under root/runs/weights with the part of `model`; its folder."""
    folder = root / "runs" / "weights" / FOLDERS[kind]
    (folder / "ckpts").mkdir(parents=True)
    for network, tensors in state_dicts(kind, model, config):
        name = "decoder" if kind == "image_decoder" else network
        save_file(tensors, folder / "ckpts" / f"{name}_step{STEP:07d}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS[kind] if settings is None else settings))
    return folder
