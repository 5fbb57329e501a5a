"""Outcomes, their summary, the paired comparison, and the files: what is written is read back, damage is one line."""

import json

import numpy as np
import pytest

from rlawm_jax.evaluation import closed_loop
from rlawm_jax.evaluation.closed_loop import ClosedLoop, EpisodeOutcome, ImaginedReturns
from rlawm_jax.evaluation.statistics import wilson
from rlawm_jax.sim.rollout import rollout, still, watching
from tests.sim.stick import TASK, Pusher, Stick


def evaluation(scores, policy="runs/a", first_seed=10_000, **task):
    settings = {"policy": policy, "task": closed_loop.plain(TASK) | task, "rows": 8}
    outcomes = [EpisodeOutcome(first_seed + i, score > 0.85, score, score / 2, 20) for i, score in enumerate(scores)]
    return ClosedLoop(settings, outcomes)


@pytest.fixture
def played():
    return closed_loop.summarise("runs/a", rollout(Stick, watching(Pusher(), 2), [100, 200, 600]), image_size=6)


def test_outcomes_keep_the_best_and_the_last_score(played):
    episode = rollout(Stick, still(8), [0])[0]
    episode.scores = [0.1, 0.7, 0.3]
    assert EpisodeOutcome.of(episode) == EpisodeOutcome(0, False, 0.7, 0.3, 3)
    assert [outcome.success for outcome in played.outcomes] == [True, True, False]
    assert played.settings["rows"] == 8 and played.settings["image_size"] == 6


def test_estimates_are_shares_with_wilson_and_scores_with_a_bootstrap():
    found = evaluation([1.0, 0.6, 0.5, 0.1]).estimates()
    assert list(found) == ["success", "reached_0.5", "score_max", "score_final"]
    assert found["success"] == wilson(1, 4)
    assert found["reached_0.5"] == wilson(3, 4)
    assert found["score_max"].value == pytest.approx(0.55)
    assert found["score_final"].value == pytest.approx(0.275)
    assert found["score_max"].low < 0.55 < found["score_max"].high


def test_a_comparison_pairs_by_seed():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 0.8, 100)
    comparison = closed_loop.compare(evaluation(base + 0.05), evaluation(base, policy="runs/b"))
    difference = comparison.differences["score_max"]
    # the values spread over 0.8, their differences not at all
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.05, 0.05, 0.05))
    first = evaluation([1.0] * 3 + [0.0] * 9 + [1.0] * 4)
    second = evaluation([0.0] * 3 + [1.0] * 9 + [1.0] * 4)
    test = closed_loop.compare(first, second).tests["success"]
    assert (test.only_first, test.only_second) == (3, 9)
    # 2 (1 + 12 + 66 + 220) / 2^12
    assert test.p_value == pytest.approx(2 * 299 / 4096)


@pytest.mark.parametrize(("scores", "seed"), [([0.1, 0.2, 0.3], 10_001), ([0.1, 0.2], 10_000)])
def test_other_seeds_are_refused_with_both_lists(scores, seed):
    with pytest.raises(ValueError) as error:
        closed_loop.compare(evaluation([0.1, 0.2, 0.3]), evaluation(scores, policy="runs/b", first_seed=seed))
    text = str(error.value)
    assert text.startswith("evaluation of runs/b: expected outcomes of the seeds 10000 to 10002 (3), found ")
    assert "--seed" in text and "\n" not in text


def test_another_task_is_refused_with_the_field_that_differs():
    with pytest.raises(ValueError, match=r"evaluation of runs/b: task\.max_steps: expected 20 .*found 30"):
        closed_loop.compare(evaluation([0.1, 0.2]), evaluation([0.1, 0.2], policy="runs/b", max_steps=30))


def test_what_is_written_is_read_back_and_holds_everything(played, tmp_path):
    settings = evaluation([0.5], policy="runs/b").settings
    other = ClosedLoop(settings, [EpisodeOutcome(seed, False, 0.5, 0.5, 20) for seed in played.seeds])
    comparison = closed_loop.compare(played, other)
    closed_loop.write(tmp_path / "run", played, comparison)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["closed_loop.json"]
    assert closed_loop.load(tmp_path / "run") == played
    content = json.loads((tmp_path / "run" / "closed_loop.json").read_text())
    assert content["estimates"]["success"]["value"] == pytest.approx(2 / 3)
    assert content["comparison"]["with"] == "runs/b"
    assert content["comparison"]["mcnemar"]["success"] == {"only_first": 2, "only_second": 0, "p_value": 0.5}


def test_imagined_returns_are_paired_by_start_and_survive_the_file(tmp_path):
    assert closed_loop.load_imagined(tmp_path) is None
    rng = np.random.default_rng(0)
    before = rng.normal(-5, 2, 40)
    imagined = ImaginedReturns(before.tolist(), (before + 0.5).tolist(), [i // 2 for i in range(40)])
    closed_loop.write_imagined(tmp_path / "run", imagined)
    assert closed_loop.load_imagined(tmp_path / "run") == imagined
    found = imagined.estimates()
    assert (found["difference"].low, found["difference"].high) == pytest.approx((0.5, 0.5))
    assert found["before"].clusters == 20
    assert found["before"].high - found["before"].low > 0.5


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"before": [1.0], "after": [NaN], "episodes": [0]}'])
def test_damaged_imagined_returns_are_one_line(content, tmp_path):
    (tmp_path / "imagined_returns.json").write_text(content)
    with pytest.raises(ValueError, match=r"imagined_returns\.json: expected .* found damage .* delete the file"):
        closed_loop.load_imagined(tmp_path)


def test_imagined_returns_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="three equally long lists"):
        ImaginedReturns([1.0, 2.0], [1.0], [0, 1])


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"closed_loop\.json: expected .*launch\.evaluate_policy --workdir="):
        closed_loop.load(tmp_path)


def remove_seed(content):
    del content["outcomes"][1]["seed"]


def repeat_seed(content):
    content["outcomes"][1]["seed"] = content["outcomes"][0]["seed"]


def drop_outcomes(content):
    content["outcomes"] = []


def no_number(content):
    content["outcomes"][0]["score_max"] = float("nan")


def text_for_number(content):
    content["outcomes"][0]["score_max"] = "0.5"


def drop_task_field(content):
    del content["settings"]["task"]["levels"]


def levels_of_another_kind(content):
    content["settings"]["task"]["levels"] = 7


def outcomes_of_another_kind(content):
    content["outcomes"] = 7


DAMAGES = [
    remove_seed,
    repeat_seed,
    drop_outcomes,
    no_number,
    text_for_number,
    drop_task_field,
    levels_of_another_kind,
    outcomes_of_another_kind,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_outcomes_are_one_line_with_the_fix(damage, played, tmp_path):
    closed_loop.write(tmp_path, played)
    content = json.loads((tmp_path / "closed_loop.json").read_text())
    damage(content)
    (tmp_path / "closed_loop.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        closed_loop.load(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'closed_loop.json'}: expected the outcomes of an evaluation, found damage (")
    assert "delete it and run" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff\xfe\x00"])
def test_a_file_that_is_no_such_json_is_one_line(content, tmp_path):
    (tmp_path / "closed_loop.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected the outcomes of an evaluation, found damage"):
        closed_loop.load(tmp_path)
