"""The command line of policies: a policy from a world model's run folder, and one line for what a person gets wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlawm_jax.policy.actor import Actor
from tests.tiny_policy import shared_world
from tests.tiny_run import SIZE

ROOT = Path(__file__).parents[2]


def run(workdir: Path, **overrides) -> subprocess.CompletedProcess:
    """`python -m launch.train_policy` with the demo recipe of BC + RLA."""
    command = [sys.executable, "-m", "launch.train_policy", "--config=configs/pusht_policy.py:rla_demo"]
    command += [f"--workdir={workdir}", *(f"--config.{name.replace('__', '.')}={v}" for name, v in overrides.items())]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def overrides(tiny_root) -> dict:
    return {
        "world_model": shared_world(tiny_root),
        "data__root": tiny_root,
        "data__token_root": tiny_root / "tokens",
        "data__val_episodes": 2,
        "data__n_labelled": 2,
        "data__batch_size": 4,
        "policy__image_size": 16,
        "policy__widths": "(4,8)",
        "policy__blocks": "(1,1)",
        "policy__hidden": "(8,)",
        "policy__rla__hidden": "(8,)",
        "policy__rla__latent_dim": 8,
        "optimizer__warmup_steps": 0,
        "train__steps": 2,
        "logging__tensorboard": False,
    }


@pytest.mark.slow
def test_a_policy_is_trained_scored_and_acts(overrides, tmp_path):
    done = run(tmp_path, **overrides)
    assert done.returncode == 0, done.stderr
    assert "2 labelled, 2 watched, 2 held-out episodes; 18 frames" in done.stderr
    assert "action MSE on 2 held-out episodes" in done.stdout
    scores = json.loads((tmp_path / "validation.json").read_text())
    assert set(scores) == {"policy", "mean_chunk", "last_action"} and all(s["value"] > 0 for s in scores.values())
    assert Actor.load(tmp_path).image_size == SIZE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"world_model": "nowhere"},
            "error: config.world_model: expected a world model's run folder with checkpoints/",
        ),
        ({"n_labeled": 3}, "did you mean --config."),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(overrides, tmp_path, wrong, message):
    done = run(tmp_path, **{**overrides, **wrong})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not any(tmp_path.iterdir())
