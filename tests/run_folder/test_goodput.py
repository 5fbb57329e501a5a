"""Goodput: every second of a run is accounted for once, over restarts."""

import json

import pytest

from rlawm_jax.run_folder.goodput import FILE, Goodput


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float):
        self.now = now

    def __call__(self) -> float:
        return self.now


def session(workdir, clock, resumed_from: int, steps: int, saves: bool = True) -> Goodput:
    """10 s to start, 2 s per step, 1 s for a checkpoint at the end."""
    goodput = Goodput(workdir, resumed_from, clock)
    for step in range(resumed_from + 1, resumed_from + steps + 1):
        clock.now += 10 if step == resumed_from + 1 else 2
        goodput.step_done(step)
    if saves:
        with goodput.saving():
            clock.now += 1
    return goodput


def test_every_second_is_accounted_for_over_restarts(tmp_path):
    clock = Clock(1000.0)
    session(tmp_path, clock, 0, 11)  # killed at 11
    clock.now += 5
    line = session(tmp_path, clock, 6, 4).close()
    record = json.loads((tmp_path / FILE).read_text())
    seconds = record["seconds"]
    assert sum(seconds.values()) == clock.now - 1000
    assert seconds["start"] == 20 and seconds["checkpoints"] == 2 and seconds["stopped"] == 5
    assert seconds["redone"] == pytest.approx(20 * 5 / 11) and seconds["steps"] == pytest.approx(26 - 20 * 5 / 11)
    assert (record["restarts"], record["steps_redone"], record["recoveries"]) == (1, 5, [10])
    assert line.startswith(f"goodput {100 * seconds['steps'] / 53:.1f} % of 53.0 s")
    assert line.endswith("; 1 restarts, 5 steps done again, 10.0 s from a restart to its first step (longest 10.0 s)")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 3}', '{"seconds": 1}'])
def test_a_damaged_record_is_replaced_by_a_new_one(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    assert "restarts" not in session(tmp_path, Clock(0.0), 3, 2).close()
