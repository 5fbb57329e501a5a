"""A session: model and simulator take the same rows from the same frame; reset, new starts, what is shown."""

import json

import numpy as np
import pytest

from rlawm_jax.interactive.controls import ActionError
from rlawm_jax.interactive.rollout import Rollout
from rlawm_jax.interactive.session import Session
from tests.interactive.tiny import ROWS, Dot, Starts, Store, tiny_rollout, tiny_session

ROW = [0.5, -0.25]


@pytest.fixture(scope="module")
def session():
    return tiny_session()


@pytest.fixture(autouse=True)
def at_the_start(session):
    session.reset()


def test_the_simulator_replays_the_episode_and_both_start_from_its_frame(session):
    start = session.start
    dot = Dot()
    dot.replay(*start.before)
    np.testing.assert_array_equal(session.shown.truth, dot.render())
    np.testing.assert_array_equal(session.shown.moment.tokens, session._rollout.encode(dot.render()))
    assert (session.shown.distance, session.shown.copied, session.shown.steps) == (0.0, 0.0, 0)


def test_model_and_simulator_take_the_same_rows_and_their_tokens_are_compared(session):
    dot, rollout = Dot(), session._rollout
    dot.replay(*session.start.before)
    first = rollout.encode(dot.render())
    moment = rollout.begin(first)
    for _ in range(ROWS + 1):
        session.step(ROW)
        dot.step(ROW)
        moment = rollout.step(moment, np.array(ROW), robot_id=0, draw=session.number)
    true = rollout.encode(dot.render())
    np.testing.assert_array_equal(session.shown.truth, dot.render())
    np.testing.assert_array_equal(session.shown.moment.tokens, moment.tokens)
    np.testing.assert_array_equal(session.shown.imagined, rollout.decode(moment.tokens))
    assert session.shown.distance == pytest.approx(np.abs(moment.tokens - true).mean())
    assert session.shown.copied == pytest.approx(np.abs(first - true).mean())
    assert session.shown.copied > 0.01


def test_a_row_of_a_model_with_a_stride_is_several_steps_of_the_simulator():
    dot = Dot()
    session = Session(tiny_rollout(), Starts(Store()), lambda store: dot, stride=3)
    before = dot.at
    session.step(ROW)
    np.testing.assert_allclose(dot.at - before, 0.3 * np.array(ROW))


def test_after_a_reset_the_same_rows_give_the_same_pictures(session):
    def drive():
        for i in range(ROWS + 1):
            session.step([0.1 * i, 0.2])
        return session.shown.imagined, session.shown.truth

    first = drive()
    session.reset()
    np.testing.assert_array_equal(first, drive())


def test_a_new_start_is_another_frame_with_other_noise(session):
    before, noise_of = session.start, session.number
    session.step(ROW)
    session.new_start()
    assert session.start.episode == before.episode + 1
    assert session.number == noise_of + 1
    assert session.shown.steps == 0


@pytest.mark.parametrize("bad", [[0.5], [0.5, float("nan")], [0.5, 1.01], "12"])
def test_a_bad_row_changes_nothing(session, bad):
    session.step(ROW)
    shown, at = session.shown, session.simulator.at
    with pytest.raises(ActionError):
        session.step(bad)
    assert session.shown is shown
    np.testing.assert_array_equal(session.simulator.at, at)


def test_a_model_that_fails_leaves_the_simulator_where_it_is(session, monkeypatch):
    shown, at = session.shown, session.simulator.at
    monkeypatch.setattr(Rollout, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step(ROW)
    assert session.shown is shown
    np.testing.assert_array_equal(session.simulator.at, at)


@pytest.mark.parametrize(
    ("hold_still", "first", "then"), [("zeros", [0, 0], [0, 0]), ("state", [0.25, 0.25], ROW), (None, None, ROW)]
)
def test_keys_add_to_standing_still_or_to_the_last_target(hold_still, first, then):
    session = tiny_session(simulator=False, hold_still=hold_still)
    expected = session.start.recorded if first is None else first
    np.testing.assert_allclose(session.shown.rest, expected)
    assert session.state()["holds"] == (hold_still is not None)
    row = np.clip(ROW, session.controls.low, session.controls.high).tolist()
    session.step(row)
    np.testing.assert_allclose(session.shown.rest, then)


@pytest.mark.parametrize("missing", ["simulator", "states"])
def test_without_a_simulator_or_recorded_states_the_model_runs_alone(missing):
    starts = Starts(Store(), states=missing != "states")
    session = Session(tiny_rollout(), starts, lambda store: None if missing == "simulator" else Dot())
    np.testing.assert_array_equal(session.shown.moment.tokens, session._rollout.encode(session.start.image))
    session.step([0.1, 0.1])
    assert (session.shown.truth, session.shown.distance, session.shown.copied) == (None, None, None)


def test_the_state_is_plain_json_that_says_where_the_rollout_is(session):
    for _ in range(ROWS + 1):
        session.step(ROW)
    state = json.loads(json.dumps(session.state(), allow_nan=False))
    assert {name: state[name] for name in ("dataset", "frame", "steps", "chunk", "rows", "chunk_rows")} == {
        "dataset": "stick:play", "frame": 4, "steps": ROWS + 1, "chunk": 1, "rows": 1, "chunk_rows": ROWS
    }  # fmt: skip
    assert len(state["controls"]["press"]) == 2
    assert state["model_seconds"] > 0 and state["simulator_seconds"] > 0
