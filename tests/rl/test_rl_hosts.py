"""Several processes or devices learn in imagination as one does: same environments, same noise, one policy."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.evaluation.closed_loop import load_imagined
from rlawm_jax.policy.checkpoint import load_policy
from rlawm_jax.rl.loop import train
from rlawm_jax.rl.setup import prepare
from tests.rl.tiny import make
from tests.tiny_run import read_metrics
from tests.tools.multi_process import all_well, launch_together, together


def overrides(settings: Mapping[str, Any], prefix: str = "--config.") -> Iterator[str]:
    """Every setting of a config as it is given on the command line."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={value}"


@pytest.fixture(scope="module")
def alone(tiny_root, cloned, tmp_path_factory):
    """The run folder of the run in this one process."""
    workdir = tmp_path_factory.mktemp("alone")
    train(prepare(make(tiny_root, cloned)), workdir)
    return workdir


def same_metrics(ours: list[dict[str, float]], alone: Path) -> None:
    """Of four iterations."""
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    for line, one in zip(ours, read_metrics(alone), strict=True):
        assert line.keys() == one.keys()
        for name, value in one.items():
            # float32 sums in another order: a policy's mean is off by 1e-6, in units of its deviation (0.07) by 1.4e-5,
            # and so are the ratios whose mean times advantages of size 1 is the loss
            np.testing.assert_allclose(line[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_kernels_in_pieces_of_fsdp_and_tensor_learn_what_whole_ones_do(alone, tiny_root, cloned, tmp_path):
    out = tmp_path / "found.json"
    command = ["-m", "tests.tools.eight_devices", str(out), str(tiny_root), str(cloned)]
    [(status, _, stderr)] = together([command], devices=8)
    assert status == 0, stderr[-4000:]
    found = json.loads(out.read_text())
    assert found["pieces"] == [1, 2, 4]  # small leaves, those of other kernels, those of attention and MLP
    same_metrics(found["metrics"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_learn_save_and_resume_as_one_does(alone, tiny_root, cloned, tmp_path, processes):
    for iterations in (2, 4):  # the second run goes on from the first's checkpoint
        settings = overrides(make(tiny_root, cloned, train__iterations=iterations).to_dict())
        arguments = ["--config=configs/rl.py", f"--workdir={tmp_path}", *settings]
        outcomes = launch_together(processes, 1, "launch.train_rl", *arguments)
        all_well(outcomes)
    assert any("resuming from iteration 2" in text for _, text in outcomes)
    same_metrics(read_metrics(tmp_path), alone)
    ours, theirs = (nnx.state(load_policy(workdir)[0]) for workdir in (tmp_path, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)
    ours, theirs = load_imagined(tmp_path), load_imagined(alone)
    assert ours is not None and theirs is not None
    # a few units in the last place of float32, far below what learning changed
    np.testing.assert_allclose(ours.before, theirs.before, rtol=3e-6)
    np.testing.assert_allclose(ours.after, theirs.after, rtol=3e-6)
    assert np.abs(np.subtract(theirs.after, theirs.before)).min() > 1e-4


@pytest.mark.slow
def test_a_missing_policy_ends_every_process_with_one_line(tmp_path):
    arguments = ["--config=configs/rl.py", f"--workdir={tmp_path}", f"--config.policy={tmp_path / 'nothing'}"]
    for status, text in launch_together(2, 1, "launch.train_rl", *arguments):
        assert status == 1
        assert text.count(f"error: {tmp_path / 'nothing'}: expected a run folder with checkpoints/, found none") == 1
        assert "Traceback" not in text
