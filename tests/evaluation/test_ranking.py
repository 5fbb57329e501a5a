"""Imagination's ranking of policies: a coefficient that knows its order, its ties and its uncertainty."""

import numpy as np
import pytest

from rlawm_jax.evaluation import closed_loop, ranking
from rlawm_jax.evaluation.closed_loop import ImaginedReturns
from tests.evaluation.test_training_seeds import write_run


def learned(tmp_path, name, before: float, after: float, real: float, starts=(0, 1)):
    """A run folder whose policy has this imagined return and this real score."""
    folder = write_run(tmp_path / name, np.full(20, real))
    returns = ImaginedReturns([before] * len(starts), [after] * len(starts), list(starts))
    closed_loop.write_imagined(folder, returns)
    return folder


def clones_and_runs(tmp_path, order=1):
    clone = write_run(tmp_path / "bc", np.full(20, 0.1))
    runs = [
        learned(tmp_path, f"rl{i}", -9.0, -8.0 + i, 0.5 + order * 0.05 * (i + 1) - (order < 0) * 0.45) for i in range(5)
    ]
    return runs, [clone] * 5


def test_agreement_is_one_and_a_reversal_minus_one(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    assert ranking.spearman(values, np.exp(values)).value == pytest.approx(1)
    assert ranking.spearman(values, -(values**3)).value == pytest.approx(-1)
    unrelated = ranking.spearman(values, rng.normal(size=12))
    assert unrelated.low < 0 < unrelated.high and unrelated.count == 12


def test_policies_that_are_all_alike_have_no_coefficient():
    none = ranking.spearman(np.arange(6.0), np.zeros(6))
    assert np.isnan([none.value, none.low, none.high]).all()


def test_a_clone_counts_once_and_the_best_imagined_policy_comes_first(tmp_path):
    policies = ranking.load(*clones_and_runs(tmp_path))
    assert len(policies) == 6
    text = ranking.format_markdown(policies)
    lines = text.splitlines()
    assert len(lines) == 2 + 6 + 1 and "rl4" in lines[2] and "/bc" in lines[-2]
    best = lines[-1].split("|")[lines[0].split("|").index(" score_max ")]
    assert best.strip().startswith("1.00")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("few", r"--runs: expected 5 policies or more, clones included, found 3"),
        ("clones", r"--clones: expected one folder for each of the 5 --runs, found 4"),
        ("returns", r"rl2: expected the imagined returns that launch\.train_rl leaves"),
        ("world", r"rl2: expected the imagined return -9\.000 of .*bc as in earlier --runs, found -4\.000"),
        ("starts", r"rl2: expected imagined returns from 2 held-out starts .* found 3"),
    ],
)
def test_what_cannot_be_ranked_names_the_folder(tmp_path, spoil, message):
    runs, clones = clones_and_runs(tmp_path)
    if spoil == "few":
        runs, clones = runs[:2], clones[:2]
    if spoil == "clones":
        clones = clones[:-1]
    if spoil == "returns":
        (runs[2] / closed_loop.IMAGINED_FILE).unlink()
    if spoil == "world":
        learned(tmp_path, "rl2", -4.0, -3.0, 0.5)
    if spoil == "starts":
        learned(tmp_path, "rl2", -9.0, -8.0, 0.5, starts=(0, 1, 2))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ranking.load(runs, clones)
