"""The loop itself, around a step that costs nothing: late metrics, checkpoints on time, a stop before anything bad."""

import errno
import signal
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.run_folder import checkpoint
from rlawm_jax.run_folder.checkpoint import Checkpointer, CheckpointError
from rlawm_jax.sharding import make_mesh
from rlawm_jax.training import loop
from rlawm_jax.training.loop import Loop, NonFiniteError, train
from rlawm_jax.training.nonfinite import guarded
from rlawm_jax.training.run import Run
from tests.tiny_run import read_metrics, tiny_config


class Numbers:
    """An endless iterator over batches 1, 2, 3... with an exact position."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return {"x": np.full((1, 1), self.position, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class FakeState(NamedTuple):
    """Of a training state the step counter, and a sum for everything else."""

    step: jax.Array
    sum: jax.Array


class FakeRun(Run):
    """A run whose state adds up the batches it saw."""

    def __init__(self, root, **overrides):
        super().__init__(
            config=tiny_config(root, **overrides),
            mesh=make_mesh(1, 1, 1),
            iterator=Numbers(),
            state=FakeState(jnp.zeros((), jnp.int32), jnp.zeros(1)),
            frozen={"scale": jnp.ones(1)},
            step_fn=None,
            meta={"fingerprint": "abc"},
        )

    def saved_frozen(self):
        return self.frozen


class Events(list):
    """What happened, in order; the step's batches that are `broken`; what to do while a step runs (`at[step]`)."""

    def __init__(self):
        super().__init__()
        self.broken, self.at = set(), {}


@pytest.fixture
def events(monkeypatch) -> Events:
    """The step adds the batch to the state."""
    happened = Events()

    def step(state, frozen, batch):
        number = float(batch["x"][0, 0])
        happened.append(f"step {number:g}")
        happened.at.get(number, lambda: None)()
        broken = number in happened.broken
        new = state.sum + (jnp.nan if broken else batch["x"][0])
        return FakeState(state.step + 1, new), {"rla/loss": batch["x"][0, 0], "rla/finite": jnp.float32(not broken)}

    report, save = Loop.report, Checkpointer.save

    def reported(self, pending, bar):
        happened.append(f"metrics {pending.step}")
        report(self, pending, bar)

    def saved(self, step, *args):
        happened.append(f"save {step}")
        save(self, step, *args)

    monkeypatch.setattr(FakeRun, "compile_step", lambda run, batch: guarded(step, run.config.train.on_nonfinite))
    monkeypatch.setattr(Loop, "report", reported)
    monkeypatch.setattr(Checkpointer, "save", saved)
    return happened


def steps_of(events: list[str]) -> list[str]:
    return [event for event in events if event.startswith("step")]


def test_metrics_are_fetched_one_step_late_and_in_time_for_a_checkpoint(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 4, "train.checkpoint_every": 3}), tmp_path)
    assert events == [
        *("step 1", "step 2", "metrics 1", "step 3", "metrics 2", "metrics 3", "save 3"),
        *("step 4", "metrics 4", "save 4"),
    ]


def test_a_resumed_run_sees_the_batches_an_unbroken_one_would(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 2}), tmp_path)
    run = FakeRun(tmp_path, **{"train.steps": 4})
    train(run, tmp_path)
    assert steps_of(events) == ["step 1", "step 2", "step 3", "step 4"]
    assert run.state.sum == 1 + 2 + 3 + 4
    assert [(line["step"], line["rla/loss"]) for line in read_metrics(tmp_path)] == [
        (i, float(i)) for i in (1, 2, 3, 4)
    ]
    events.clear()
    train(FakeRun(tmp_path, **{"train.steps": 4}), tmp_path)
    assert events == []  # nothing left to train


@pytest.mark.parametrize("every", [3, 5, 7])
def test_not_a_number_stops_the_run_with_the_state_before_it_saved(tmp_path, events, every):
    events.broken = {5}
    recipe = {"train.steps": 9, "train.checkpoint_every": every}
    with pytest.raises(
        NonFiniteError, match=r"step 5: loss or gradient of rla is not finite; .* step 4 is saved"
    ) as error:
        train(FakeRun(tmp_path, **recipe), tmp_path)
    assert "config.optimizer.learning_rate" in str(error.value) and "\n" not in str(error.value)
    assert Checkpointer(tmp_path, read_only=True).latest() == 4
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    events.broken, run = set(), FakeRun(tmp_path, **recipe)
    events.clear()
    train(run, tmp_path)  # it was a cosmic ray
    assert steps_of(events) == [f"step {i}" for i in range(5, 10)]
    assert run.state.sum == sum(range(1, 10)) and run.state.step == 9


def test_not_a_number_in_the_first_step_saves_nothing(tmp_path, events):
    events.broken = {1}
    with pytest.raises(NonFiniteError, match="step 1"):
        train(FakeRun(tmp_path, **{"train.steps": 9}), tmp_path)
    assert Checkpointer(tmp_path, read_only=True).steps == []


def test_steps_that_are_not_numbers_can_be_skipped_and_are_counted(tmp_path, events, capsys):
    events.broken = {2, 5}
    run = FakeRun(tmp_path, **{"train.steps": 6, "train.checkpoint_every": 2, "train.on_nonfinite": "skip"})
    train(run, tmp_path)
    assert run.state.sum == 1 + 3 + 4 + 6 and run.state.step == 6
    assert "step 5: loss or gradient of rla is not finite: skipped (2 so far)" in capsys.readouterr().err


def test_skipping_without_end_is_a_stop(tmp_path, events, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 4)
    events.broken = set(range(6, 90))
    with pytest.raises(NonFiniteError, match=r"[45] steps in a row"):
        train(FakeRun(tmp_path, **{"train.steps": 90, "train.on_nonfinite": "skip"}), tmp_path)
    assert 9 <= Checkpointer(tmp_path, read_only=True).latest() <= 11


def test_neither_stop_nor_skip_is_refused():
    with pytest.raises(ValueError, match=r"config\.train\.on_nonfinite: expected stop or skip, found 'ignore'"):
        guarded(lambda *_: None, "ignore")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_at_hand_and_ends_the_process(tmp_path, events, number):
    events.at[5] = partial(signal.raise_signal, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(FakeRun(tmp_path, **{"train.steps": 9, "train.checkpoint_every": 3}), tmp_path)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert Checkpointer(tmp_path, read_only=True).latest() == 5
    run = FakeRun(tmp_path, **{"train.steps": 9, "train.checkpoint_every": 3})
    train(run, tmp_path)
    assert run.state.sum == sum(range(1, 10))


def test_a_full_disk_does_not_stop_the_training_until_its_last_checkpoint(tmp_path, events, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    recipe = {"train.steps": 9, "train.checkpoint_every": 2}
    with pytest.raises(CheckpointError, match=r"9: could not be written: .*No space left on device"):
        train(FakeRun(tmp_path, **recipe), tmp_path)
    assert steps_of(events)[-1] == "step 9"
    told = capsys.readouterr().err
    assert all(f"NOT SAVED, training goes on: checkpoint {tmp_path}/checkpoints/{step}" in told for step in (2, 4, 6))
    monkeypatch.undo()


def test_metrics_that_cannot_be_written_do_not_stop_the_training(tmp_path, events, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.MetricLogger, "write", full)
    train(FakeRun(tmp_path, **{"train.steps": 3}), tmp_path)
    assert Checkpointer(tmp_path, read_only=True).latest() == 3
    assert "step 2: metrics not written" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_costs_an_interval(tmp_path, events, capsys):
    train(FakeRun(tmp_path, **{"train.steps": 4, "train.checkpoint_every": 2}), tmp_path)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    run = FakeRun(tmp_path, **{"train.steps": 6, "train.checkpoint_every": 2})
    train(run, tmp_path)
    assert steps_of(events)[4:] == ["step 3", "step 4", "step 5", "step 6"]
    assert run.state.sum == sum(range(1, 7))
    told = capsys.readouterr().err
    assert "meta/metadata has 2 bytes" in told and "1 restarts, 2 steps done again" in told


def test_a_run_on_another_backbone_is_refused(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 2}), tmp_path)
    run = FakeRun(tmp_path, **{"train.steps": 4})
    run.meta["fingerprint"] = "xyz"
    with pytest.raises(ValueError, match=r"checkpoints/2: expected backbone abc as when saved, found xyz; .*--workdir"):
        train(run, tmp_path)
    assert run.state.sum == 0


def test_only_every_nth_step_is_logged(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 4, "train.log_every": 2}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]
