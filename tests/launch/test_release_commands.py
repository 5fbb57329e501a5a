"""Convert, build, evaluate: three commands from a tree of the release to a row of Table 1."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from tests.convert.release_tree import FOLDERS, write_run
from tests.data.release_tree import label_of, write_index, write_trajectory
from tests.tiny_models import tiny_config, tiny_world

ROOT = Path(__file__).parents[2]
TASK = "data/maniskill/ppo/panda/PullCube-v2"
SIZES = {"rla__heads": 4, "denoiser__heads": 8, "image_decoder__width": 128, "denoiser__action_dims": {"0": 9}}
GROUPS = ("success", "fail")


def command(module: str, *arguments: str) -> str:
    """What the command prints; the time it took and the most memory it held go to our own output."""
    begin = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed
    print(f"{module}: {time.monotonic() - begin:.0f} s, at most {usage.ru_maxrss / 2**20:.1f} GiB")
    return printed


def write_data(release: Path) -> None:
    """Two groups of one task, a trajectory each."""
    for g, group in enumerate(GROUPS):
        folder = release / TASK / group
        write_trajectory(folder / "traj_000003", label_of(g, 3), 40, success=group == "success")
        write_index(folder, "panda")


def write_handles(path: Path, horizons: tuple[int, ...]) -> Path:
    """A handle per group and horizon, with a root of the authors' machine."""
    root = f"/home/author/rla-wm/{TASK}"
    handles = {
        str(h): [
            {"dataset_root": f"{root}/{group}", "traj_id": 3, "frame_id": 4, "sampled_horizon": h} for group in GROUPS
        ]
        for h in horizons
    }
    path.write_text(json.dumps({"meta": {}, "handles_by_horizon": handles}))
    return path


def three_commands(
    folder: Path, recipe: list[str], *, image_size: int, horizons: tuple[int, ...], intervals: Mapping[str, list[int]]
) -> None:
    """Run them on folder/release, and look at the row that every protocol prints; `intervals` are of each horizon."""
    release, run, datasets = folder / "release", folder / "run", folder / "datasets"
    handles = write_handles(folder / "handles.json", horizons)
    recipe = [*recipe, f"--config.backbone.image_size={image_size}", f"--config.data.root={datasets}"]
    source = release / "runs/weights" / FOLDERS["denoiser"]
    there = [f"--source={source}", f"--output={run}"]
    assert "denoiser: " in command("launch.convert", "--kind=release", *there, *recipe, "--noparity")
    data = [f"--source={release / 'data/maniskill'}", f"--data_dir={datasets}", f"--image_size={image_size}"]
    command("data.build", "maniskill", *data)
    count = len(GROUPS) * len(horizons)
    for protocol, rows in intervals.items():
        printed = command("launch.evaluate", f"--workdir={run}", f"--handles={handles}", f"--protocol={protocol}")
        assert re.search(rf"\| RLA-WM \| - \| 0?\.?\S+ \| \d\S+ \| {count} \| {protocol} \|", printed), printed
        saved = json.loads((run / f"handles_{protocol}.json").read_text())
        assert [sum(result["chunks"]) for result in saved["table"]] == rows


@pytest.mark.slow
def test_three_commands_from_a_release_tree_to_a_row_of_table_1(tmp_path):
    model, config = tiny_world(**SIZES), tiny_config(**SIZES)
    for kind in FOLDERS:
        settings = {"models": {"encoder": {"args": {"num_heads": 4}}, "flow_model": {"args": {"num_heads": 8}}}}
        if kind == "denoiser":
            settings["runs"] = {k: f"/authors/{FOLDERS[k]}" for k in ("rla", "image_decoder")}
        write_run(kind, tmp_path / "release", model, config, settings)
    write_data(tmp_path / "release")
    recipe = [
        "--config=configs/maniskill.py:panda",
        "--config.backbone.name=dinov2_vits14",
        "--config.backbone.weights=random:0",
        "--config.sampler.steps=2",
        "--config.eval.batch_size=2",
    ]
    protocols = {"release": [4, 27], "exact": [4, 29]}
    three_commands(tmp_path, recipe, image_size=28, horizons=(5, 30), intervals=protocols)


@pytest.mark.slow
@pytest.mark.torch
def test_three_commands_with_a_random_checkpoint_of_official_width(tmp_path):
    """Files of the release's sizes, frames of 4 x 4 patches, four flow steps; what it costs: pytest -rP."""
    import torch

    from tests.convert.official import network

    heads = {"args": {"num_heads": 16}}
    settings = {
        "image_decoder": {},
        "rla": {"models": {"encoder": heads, "decoder": heads}},
        "denoiser": {
            "models": {"flow_model": heads},
            "runs": [f"/authors/{FOLDERS[kind]}" for kind in ("rla", "image_decoder")],
        },
    }
    names = {"image_decoder": ("image_decoder",), "rla": ("encoder", "decoder"), "denoiser": ("flow_model",)}
    files = []
    for kind, folder in FOLDERS.items():
        run = tmp_path / "release/runs/weights" / folder
        (run / "ckpts").mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(settings[kind]))
        for name in names[kind]:
            alias = "decoder" if kind == "image_decoder" else name
            files.append(run / "ckpts" / f"{alias}_step0100000.pt")
            torch.save(network(name).state_dict(), files[-1])
    write_data(tmp_path / "release")
    recipe = ["--config=configs/maniskill.py:panda", "--config.backbone.weights=random:0"]
    recipe += ["--config.sampler.steps=4", "--config.eval.batch_size=2"]
    three_commands(tmp_path, recipe, image_size=64, horizons=(5,), intervals={"release": [4]})
    for path in (*files, *(tmp_path / "run/checkpoints").rglob("*")):  # gigabytes; pytest keeps three runs' folders
        if path.is_file():
            path.unlink()
