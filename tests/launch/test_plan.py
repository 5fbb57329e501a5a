"""The command plans on real Push-T episodes, with a tiny world model, and judges in the real simulator."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from tests.commands import run_module
from tests.tiny_policy import shared_world

AHEAD, COUNT, CHUNK = 4, 4, 2


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> Path:
    """Forty held-out episodes and two for the probe, as small as the tiny model's frames."""
    pytest.importorskip("gym_pusht", reason="pip install -r launch/requirements-demo.txt")
    root = tmp_path_factory.mktemp("pusht")
    run_module("data.build", "pusht", f"--data_dir={root}", "--image_size=28", "--limit=42", "--only=play")
    return root


@pytest.fixture(scope="module")
def arguments(episodes, tiny_root) -> list[str]:
    search = [f"--ahead={AHEAD}", f"--count={COUNT}", "--candidates=4", "--rounds=2", "--batch_size=3", "--worlds=3"]
    return [f"--workdir={shared_world(tiny_root)}", f"--data_dir={episodes}", "--goals=pusht:play", *search]


@pytest.mark.sim
def test_it_judges_plans_beside_floors_and_a_roof_that_reaches_the_goal(arguments, tiny_root):
    text = run_module("launch.plan", *arguments, "--execute=2", "--videos=2")
    saved = json.loads((shared_world(tiny_root) / "planning.json").read_text())
    results = {name: np.array(of["distances"]) for name, of in saved["results"][str(AHEAD)].items()}
    assert set(results) == {"cem", "recorded actions", "standing still", "random actions"}
    assert {d.shape for d in results.values()} == {(COUNT, AHEAD + CHUNK + 1, 2)}
    moved = np.array(saved["moved"][str(AHEAD)])
    assert moved[:, 0].min() > 0.005
    for distances in results.values():
        np.testing.assert_allclose(distances[:, 0], moved, atol=1e-3)
    # the goal is where the simulator got to by the same actions
    assert results["recorded actions"][:, AHEAD].max() < 1e-3
    films = sorted((shared_world(tiny_root) / "plans").iterdir())
    assert [film.name for film in films] == ["ahead_4_0.mp4", "ahead_4_1.mp4"]
    with av.open(films[0]) as video:
        stream = video.streams.video[0]
        assert stream.width == 2 * stream.height  # the goal beside
        # the start, every step, and the last frame for a second more
        assert sum(1 for _ in video.decode(stream)) == 1 + AHEAD + CHUNK + 10
    assert len(saved["probe_errors"]) == 2 and "| 4 | effector | cem | 4 |" in text


@pytest.mark.sim
def test_what_cannot_be_planned_is_one_line(arguments):
    for wrong, line in {
        "--ahead=8,x": "error: --ahead: expected numbers above 0, found 8,x",
        "--radii=": "error: --radii: expected numbers above 0, found none",
        "--effort=0.1": "error: --effort: expected 0, since zeros do not hold the robot of pusht:play still, found 0.1",
        "--simulator=panda_push": "error: --simulator: expected actions of 2 numbers as the world model in ",
        "--ahead=100000": "error: --ahead: expected fewer than the frames of the episodes of pusht:play, found 100000",
    }.items():
        assert run_module("launch.plan", *arguments, wrong, ok=False).startswith(line)
