"""Convert, build, evaluate: three commands from a tree of the release to a row of Table 1."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.release_tree import FOLDERS, write_run
from tests.data.release_tree import label_of, write_index, write_trajectory
from tests.tiny_models import tiny_config, tiny_world

ROOT = Path(__file__).parents[2]
SIZES = {"rla__heads": 4, "denoiser__heads": 8, "image_decoder__width": 128, "denoiser__action_dims": {"0": 9}}


def command(module: str, *arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_three_commands_from_a_release_tree_to_a_row_of_table_1(tmp_path):
    model, config = tiny_world(**SIZES), tiny_config(**SIZES)
    for kind in FOLDERS:
        settings = {"models": {"encoder": {"args": {"num_heads": 4}}, "flow_model": {"args": {"num_heads": 8}}}}
        if kind == "denoiser":
            settings["runs"] = {k: f"/authors/{FOLDERS[k]}" for k in ("rla", "image_decoder")}
        write_run(kind, tmp_path / "release", model, config, settings)
    for g, group in enumerate(("success", "fail")):
        folder = tmp_path / "release/data/maniskill/ppo/panda/PullCube-v2" / group
        write_trajectory(folder / "traj_000003", label_of(g, 3), 40, success=group == "success")
        write_index(folder, "panda")
    root = "/home/author/rla-wm/data/maniskill/ppo/panda/PullCube-v2"
    handles = {
        str(h): [
            {"dataset_root": f"{root}/{group}", "traj_id": 3, "frame_id": 4, "sampled_horizon": h}
            for group in ("success", "fail")
        ]
        for h in (5, 30)
    }
    (tmp_path / "handles.json").write_text(json.dumps({"meta": {}, "handles_by_horizon": handles}))

    recipe = [
        "--config=configs/maniskill.py:panda",
        "--config.backbone.name=dinov2_vits14",
        "--config.backbone.weights=random:0",
        "--config.backbone.image_size=28",
        "--config.sampler.steps=2",
        "--config.eval.batch_size=2",
        f"--config.data.root={tmp_path / 'datasets'}",
    ]
    source = tmp_path / "release/runs/weights" / FOLDERS["denoiser"]
    run = f"--output={tmp_path / 'run'}"
    assert "denoiser: " in command("launch.convert", "--kind=release", f"--source={source}", run, *recipe, "--noparity")
    data = [f"--source={tmp_path / 'release/data/maniskill'}", f"--data_dir={tmp_path / 'datasets'}", "--image_size=28"]
    command("data.build", "maniskill", *data)
    for protocol, intervals in (("release", 27), ("exact", 29)):
        given = [f"--workdir={tmp_path / 'run'}", f"--handles={tmp_path / 'handles.json'}", f"--protocol={protocol}"]
        printed = command("launch.evaluate", *given)
        assert re.search(rf"\| RLA-WM \| - \| 0?\.?\S+ \| \d\S+ \| 4 \| {protocol} \|", printed), printed
        found = json.loads((tmp_path / "run" / f"handles_{protocol}.json").read_text())
        assert [sum(result["chunks"]) for result in found["table"]] == [4, intervals]
