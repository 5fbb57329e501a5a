"""The cost of checkpoints and of resuming, as tests/tools/lost_time.py measures them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.lost_time import configured_interval, costs


def test_a_checkpoint_costs_what_its_steps_take_beyond_undisturbed_ones():
    # steps of 1 s; one checkpoint holds the loop for 0.5 s and slows the step beside it by 0.2 s, one costs nothing
    lengths = [3.0, *[1.0] * 9, 1.5, 1.2, *[1.0] * 8, *[1.0] * 6]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    begun, done = [ends[9] + 0.01, ends[19] + 0.01], [ends[10] + 0.5, ends[19] + 0.5]
    step, lost = costs({"steps": ends, "begun": begun, "done": done})
    assert step == pytest.approx(1.0)
    assert lost == pytest.approx([0.7, 0.0])


def test_without_an_undisturbed_step_there_is_no_result():
    with pytest.raises(SystemExit, match="raise --every"):
        costs({"steps": [1.0, 2.0, 3.0, 4.0], "begun": [1.1, 2.1], "done": [1.9, 3.5]})
    with pytest.raises(SystemExit, match="raise --every"):
        costs({"steps": [1.0, 2.0], "begun": [1.1], "done": [3.5]})


def test_the_interval_is_the_recipes_or_the_command_lines():
    assert configured_interval(["--config=configs/pusht.py:demo"]) == 450
    assert configured_interval(["--config=configs/pusht.py:demo", "--config.train.checkpoint_every=7"]) == 7
    assert configured_interval([]) is None


@pytest.mark.slow
def test_both_are_measured_on_a_real_training(tiny_root):
    command = [
        sys.executable,
        "-m",
        "tests.tools.lost_time",
        "--config=configs/pusht.py:debug",
        "--every=100",
        "--repeats=1",
    ]
    command += [f"--config.data.root={tiny_root}", f"--config.data.token_root={tiny_root / 'tokens'}"]
    command += ["--config.train.steps=1000", "--config.objectives.image_decoder.enabled=False"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"a checkpoint of \d+\.\d MiB holds the loop for .* every 2 steps .* \d+\.\d\d %", done.stdout)
    # both kinds of start compile the same step: a resumed one that takes twice as long would be broken
    ratio = re.search(r"resumed: (\d+\.\d\d) x", done.stdout)
    assert ratio and float(ratio[1]) < 2, done.stdout
