"""The command line: a killed run resumes exactly, and every mistake of a user is one line and exit status 1."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import cli
from rlawm_jax.run_folder.checkpoint import FROZEN, STATE, Checkpointer
from rlawm_jax.training.loop import train
from rlawm_jax.training.setup import prepare
from tests.tiny_run import read_metrics, tiny_config

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 16, 4
# the image decoder would be most of the compilation
RECIPE = {"train.steps": STEPS, "train.checkpoint_every": EVERY, "objectives.image_decoder.enabled": False}


def start(*arguments: str) -> subprocess.Popen:
    """`python -m launch.train` with the debug recipe."""
    command = [sys.executable, "-m", "launch.train", "--config=configs/pusht.py:debug", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def error_of(process: subprocess.Popen) -> str:
    """The one error line of a run that failed as it should: status 1, no traceback."""
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]), stderr
    return lines[0]


@pytest.fixture(scope="module")
def arguments(tiny_root) -> list[str]:
    overrides = {
        "data.root": tiny_root,
        "data.token_root": tiny_root / "tokens",
        "logging.tensorboard": False,
    } | RECIPE
    return [f"--config.{name}={value}" for name, value in overrides.items()]


@pytest.fixture(scope="module")
def unbroken(tiny_root, tmp_path_factory):
    """The same run in this process, never interrupted."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run = prepare(tiny_config(tiny_root, **RECIPE), workdir)
    train(run, workdir)
    return run, workdir


@pytest.fixture(scope="module")
def killed(arguments, unbroken, tmp_path_factory) -> Path:
    """The folder of a run that got SIGKILL after its first checkpoint and before its last."""
    workdir = tmp_path_factory.mktemp("killed")
    process = start(f"--workdir={workdir}", *arguments)
    while not (workdir / "checkpoints" / str(EVERY)).is_dir():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = Checkpointer(workdir, read_only=True).steps
    assert steps and max(steps) < STEPS, "the run was over before it could be killed"
    return workdir


@pytest.mark.slow
def test_a_killed_run_started_again_equals_an_unbroken_one_bit_for_bit(
    killed, unbroken, arguments, tiny_root, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    process = start(f"--workdir={workdir}", *arguments)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
    assert "resuming from step " in stderr
    run, other = unbroken
    assert read_metrics(workdir) == read_metrics(other)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, STEPS + 1))
    ours, theirs = (Checkpointer(folder, read_only=True) for folder in (workdir, other))
    assert ours.data(STEPS) == theirs.data(STEPS)  # the data's position
    arrays = {STATE: run.state, FROZEN: run.saved_frozen()}
    saved = ours.arrays(STEPS, **arrays)
    for name, expected in arrays.items():
        for left, right in zip(*map(jax.tree.leaves, (saved[name], expected)), strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_a_run_with_damaged_checkpoints_alone_is_one_line(killed, arguments, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    steps = Checkpointer(workdir, read_only=True).steps
    for step in steps:
        for path in (workdir / "checkpoints" / str(step) / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    process = start(f"--workdir={workdir}", *arguments)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert f"DAMAGED CHECKPOINT {workdir / 'checkpoints' / str(steps[-1])}: state/" in stderr
    assert (
        stderr.rstrip().splitlines()[-1].startswith(f"error: {workdir / 'checkpoints'}: expected an intact checkpoint")
    )


def test_a_misspelt_override_is_refused_with_the_nearest_name(tmp_path):
    text = error_of(start(f"--workdir={tmp_path}", "--config.optimizer.learning_rat=1"))
    assert text == (
        "error: --config.optimizer.learning_rat: no such field in configs/pusht.py:debug; "
        "did you mean --config.optimizer.learning_rate?"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=configs/pusht.py", "--config.train.stpes=3"], "did you mean --config.train.steps?"),
        (["--config", "configs/pusht.py", "--config.train.stpes=3"], "did you mean --config.train.steps?"),
        (["--config=configs/pusht.py", "--config.rla.width.x=3"], "no such field"),
        (["--config=configs/pusht.py:small"], "expected a variant among demo, debug, found 'small'"),
        (["--config=configs/none.py"], "--config: expected a recipe such as configs/pusht.py"),
    ],
)
def test_a_config_or_field_that_does_not_exist_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.check_overrides(argv)
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text and text.count("\n") == 1


def test_overrides_that_exist_pass():
    cli.check_overrides(["--config=configs/pusht.py:demo", "--config.rla.width=8", "--config.data.interaction.prob=0"])
    cli.check_overrides(["--workdir=runs/x"])
