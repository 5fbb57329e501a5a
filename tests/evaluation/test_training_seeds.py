"""Runs of one recipe are pooled over trainings and test cases, and only where they are comparable."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from rlawm_jax.evaluation import closed_loop, training_seeds
from rlawm_jax.evaluation.closed_loop import ClosedLoop, EpisodeOutcome, ImaginedReturns
from rlawm_jax.run_folder.checkpoint import Checkpointer
from tests.sim.stick import TASK


def write_run(folder, scores, *, first_seed=100, gain=None, error=None, seed=None):
    settings = {"policy": str(folder), "task": closed_loop.plain(TASK), "rows": 8}
    outcomes = [
        EpisodeOutcome(first_seed + i, score > 0.85, score, score / 2, 20) for i, score in enumerate(map(float, scores))
    ]
    closed_loop.write(folder, ClosedLoop(settings, outcomes))
    if gain is not None:
        closed_loop.write_imagined(folder, ImaginedReturns([-2.0, -3.0], [-2.0 + gain, -3.0 + gain], [0, 1]))
    if error is not None:
        (folder / training_seeds.VALIDATION_FILE).write_text(json.dumps({"policy": {"value": error}}))
    if seed is not None:
        checkpoints = Checkpointer(folder)
        arrays = {"x": np.zeros(1)}
        checkpoints.save(1, arrays, arrays, {"seed": seed}, {"config": json.dumps({"seed": seed})})
        checkpoints.close()
    return folder


def interval(text, name, column=-2):
    """(value, low, high) of a cell, by default of the best score."""
    return tuple(map(float, re.findall(r"-?[\d.]+", cells(text, name)[column])))


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_line_per_run_a_pooled_line_and_a_paired_difference(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.5, 50)  # cases differ by more than the recipes do
    ours = [write_run(tmp_path / f"a{i}", hard + 0.1 + 0.01 * i, gain=0.5, error=0.1 * i) for i in range(3)]
    theirs = [write_run(tmp_path / f"b{i}", hard, error=0.2) for i in range(2)]
    text = training_seeds.format_markdown(training_seeds.load(ours), training_seeds.load(theirs))
    assert len(text.splitlines()) == 2 + 3 + 1 + 2 + 1 + 1
    head = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")][1:]
    difference = dict(zip(head, cells(text, "difference"), strict=True))
    value, low, high = map(float, re.findall(r"[\d.]+", difference["best score"]))
    assert value == pytest.approx(0.11, abs=6e-4) and 0.08 < low < value < high < 0.14  # the cases cancel
    assert difference[training_seeds.GAIN] == ""  # the others were never in imagination
    assert dict(zip(head, cells(text, "all 3"), strict=True))[training_seeds.GAIN].startswith("0.500 [0.500, 0.500]")
    assert dict(zip(head, cells(text, str(ours[1])), strict=True))[training_seeds.ERROR] == "0.100"


def test_pooled_intervals_know_that_trainings_differ(tmp_path):
    same = [write_run(tmp_path / f"s{i}", np.linspace(0, 0.2, 100)) for i in range(3)]
    apart = [write_run(tmp_path / f"d{i}", np.linspace(0, 0.2, 100) + 0.3 * i) for i in range(3)]

    def width(folders):
        text = cells(training_seeds.format_markdown(training_seeds.load(folders)), "all 3")[-2]
        low, high = text[text.index("[") + 1 : -1].split(", ")
        return float(high) - float(low)

    assert width(apart) > 5 * width(same)


def test_the_difference_of_a_recipe_from_itself_is_zero_for_certain(tmp_path):
    rng = np.random.default_rng(0)
    runs = [write_run(tmp_path / f"r{i}", rng.uniform(0, 0.8, 30), error=0.1 * i, seed=i) for i in range(3)]
    these, others = training_seeds.load(runs), training_seeds.load(runs[::-1])
    text = training_seeds.format_markdown(these, others)
    assert cells(text, "difference")[0] == "0.000 [0.000, 0.000]"  # the held-out error: one number per run
    assert interval(text, "difference") == (0, 0, 0)
    assert training_seeds.pairing(these, others) == "Difference: paired by training seed and by test case."


def test_what_a_training_seed_does_to_both_recipes_cancels_where_the_seeds_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    luck = np.linspace(0, 0.5, 4)  # of a seed, much larger than the recipes' difference
    ours = [write_run(tmp_path / f"a{i}", luck[i] + 0.05 + rng.uniform(0, 0.05, 40), seed=i) for i in range(4)]
    theirs, strangers = (
        training_seeds.load(
            [write_run(tmp_path / f"{n}{i}", luck[i] + rng.uniform(0, 0.05, 40), seed=first + i) for i in range(4)]
        )
        for n, first in (("b", 0), ("c", 1))
    )
    found = training_seeds.load(ours)
    value, low, high = interval(training_seeds.format_markdown(found, theirs), "difference")
    assert 0 < low < value < high
    _, apart_low, apart_high = interval(training_seeds.format_markdown(found, strangers), "difference")
    assert apart_low < 0 < apart_high and apart_high - apart_low > 10 * (high - low)
    assert training_seeds.pairing(found, strangers) == (
        "Difference: runs unpaired (training seeds 0/0, 1/1, 2/2, 3/3 against 1/1, 2/2, 3/3, 4/4); "
        "paired by test case only."
    )


def test_no_success_at_all_is_not_certainty(tmp_path):
    runs = [write_run(tmp_path / f"n{i}", np.linspace(0, 0.2, 50)) for i in range(2)]
    text = training_seeds.format_markdown(training_seeds.load(runs), training_seeds.load(runs))
    # Wilson's upper end of 0 in 50 is z^2 / (n + z^2)
    assert cells(text, "difference")[0] == ""
    for line in text.splitlines()[2:5]:
        assert line.split("|")[2].strip() == f"0.000 [0.000, {1.96**2 / (50 + 1.96**2):.3f}]"


def test_runs_on_other_seeds_or_damaged_ones_are_named(tmp_path):
    good = write_run(tmp_path / "good", [0.1, 0.2])
    other = write_run(tmp_path / "other", [0.1, 0.2], first_seed=7)
    with pytest.raises(ValueError, match=r"other: expected outcomes of the seeds 100 to 101 \(2\), found 7 to 8"):
        training_seeds.load([good, other])
    with pytest.raises(FileNotFoundError, match=r"nowhere.*closed_loop\.json"):
        training_seeds.load([good, tmp_path / "nowhere"])
    (good / training_seeds.VALIDATION_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"validation\.json: expected a policy's validation, found damage"):
        training_seeds.load([good])


def test_the_command_prints_the_table(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", [0.1 * i, 0.2, 0.3]) for i in range(2)]
    against = write_run(tmp_path / "base", [0.1, 0.1, 0.1])
    command = [sys.executable, "-m", "launch.compare_runs", f"--runs={runs[0]},{runs[1]}", f"--against={against}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| all 2 |" in done.stdout and "| difference |" in done.stdout
    assert "runs unpaired (training seeds unknown, unknown against unknown)" in done.stdout
    done = subprocess.run([*command[:3], f"--runs={tmp_path / 'nowhere'}"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "nowhere" in done.stderr and "Traceback" not in done.stderr
