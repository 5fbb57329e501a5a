"""The command: baselines without a run, comparison without a rerun, and one line for what a person gets wrong."""

import json
from functools import partial

import av
import numpy as np
import pytest

from rlawm_jax.policy.checkpoint import save_policy
from tests.commands import run_module
from tests.tiny_policy import policy_config, random_policy
from tests.tiny_run import SIZE

evaluate = partial(run_module, "launch.evaluate_policy")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Results of both baselines on the same four seeds."""
    pytest.importorskip("gym_pusht", reason="pip install -r launch/requirements-demo.txt")
    folder = tmp_path_factory.mktemp("closed_loop")
    for baseline, videos in (("still", 0), ("random", 2)):
        kind = f"--baseline={baseline}", "--simulator=pusht"
        evaluate(f"--workdir={folder / baseline}", *kind, "--episodes=4", f"--videos={videos}")
    return folder


@pytest.mark.sim
def test_a_baseline_leaves_outcomes_a_table_and_playable_videos(folders):
    saved = json.loads((folders / "random" / "closed_loop.json").read_text())
    assert [row["seed"] for row in saved["outcomes"]] == [10_000, 10_001, 10_002, 10_003]
    assert "| coverage, best of the episode |" in (folders / "random" / "closed_loop.md").read_text()
    assert not (folders / "still" / "videos").exists()
    for row in saved["outcomes"][:2]:
        with av.open(folders / "random" / "videos" / f"seed_{row['seed']}.mp4") as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
            # a frame before and after every step, and the last one for a second more
            assert sum(1 for _ in video.decode(stream)) == row["steps"] + 1 + 10


@pytest.mark.sim
def test_a_trained_policy_acts_on_rendered_frames(folders, tmp_path):
    config = policy_config()
    config.observed.image_size = SIZE
    config.data.demonstrations = ("pusht:demo",)  # says where to act
    policy = random_policy(config)
    policy.set_limits(np.array([[0, 0], [512, 512]], np.float32))
    save_policy(tmp_path, config, policy, 3)
    arguments = (f"--workdir={tmp_path}", "--episodes=4", "--videos=1", "--batch_size=3")
    text = evaluate(*arguments, f"--against={folders / 'still'}")
    assert f"| {tmp_path} | still (baseline) | difference |" in text
    settings = json.loads((tmp_path / "closed_loop.json").read_text())["settings"]
    assert (settings["step"], settings["image_size"], settings["rows"]) == (3, SIZE, 3)
    assert "seed 10000: " in (tmp_path / "closed_loop.html").read_text(encoding="utf-8")


@pytest.mark.sim
def test_two_evaluations_are_compared_without_running_either_again(folders):
    before = (folders / "random" / "closed_loop.json").read_bytes()
    text = evaluate(f"--workdir={folders / 'still'}", "--reuse", f"--against={folders / 'random'}")
    assert "| still (baseline) | random (baseline) | difference |" in text
    assert "McNemar's exact p = 1" in text
    assert (folders / "random" / "closed_loop.json").read_bytes() == before
    comparison = json.loads((folders / "still" / "closed_loop.json").read_text())["comparison"]
    assert comparison["with"] == "random (baseline)"


@pytest.mark.sim
def test_other_seeds_are_refused_before_anything_runs(folders, tmp_path):
    arguments = [f"--workdir={tmp_path / 'x'}", "--baseline=still", "--simulator=pusht", "--seed=5"]
    arguments += [f"--against={folders / 'random'}"]
    assert "expected outcomes of the seeds 5 to 204 (200), found 10000 to 10003 (4)" in evaluate(*arguments, ok=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_folder_without_a_policy_or_without_outcomes_is_one_line(tmp_path):
    missing = evaluate(f"--workdir={tmp_path / 'a'}", f"--against={tmp_path / 'b'}", ok=False)
    assert f"{tmp_path / 'b' / 'closed_loop.json'}: expected the outcomes of an evaluation" in missing
    same = evaluate(f"--workdir={tmp_path}", f"--against={tmp_path}", ok=False)
    assert "--against: expected a folder other than --workdir" in same
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "--workdir: expected a separate folder for the results of --baseline" in evaluate(
        f"--workdir={tmp_path / 'run'}", "--baseline=still", ok=False
    )
    nowhere = evaluate(f"--workdir={tmp_path / 'c'}", "--baseline=still", ok=False)
    assert "--simulator: expected one of pusht, panda_touch, panda_push, panda_mark, found none" in nowhere
