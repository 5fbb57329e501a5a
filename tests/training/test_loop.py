"""The loop itself, around a step that costs nothing: late metrics, checkpoints on time, a stop before anything bad."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.checkpoint import Checkpointer
from rlawm_jax.sharding import make_mesh
from rlawm_jax.training import loop
from rlawm_jax.training.loop import NonFiniteError, train
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


class FakeRun(SimpleNamespace):
    """What `train` needs of a run: a state that adds up the batches it saw."""

    def __init__(self, root, **overrides):
        super().__init__(
            config=tiny_config(root, **overrides),
            mesh=make_mesh(1, 1, 1),
            iterator=Numbers(),
            state={"sum": jnp.zeros(1)},
            frozen={"scale": jnp.ones(1)},
            meta={"fingerprint": "abc"},
        )

    def saved_frozen(self):
        return self.frozen


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happened, in order. The step adds the batch to the state and is broken where the batch is 5."""
    happened = []

    def step(state, frozen, batch):
        number = float(batch["x"][0, 0])
        happened.append(f"step {number:g}")
        good = jnp.asarray(float(number != 5))
        return {"sum": state["sum"] + batch["x"][0]}, {"rla/loss": batch["x"][0, 0], "rla/finite": good}

    report, save = loop._report, Checkpointer.save

    def reported(pending, *args):
        happened.append(f"metrics {pending[0]}")
        report(pending, *args)

    def saved(self, step, *args):
        happened.append(f"save {step}")
        save(self, step, *args)

    monkeypatch.setattr(loop, "_compile", lambda run, batch: step)
    monkeypatch.setattr(loop, "_report", reported)
    monkeypatch.setattr(Checkpointer, "save", saved)
    return happened


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
    assert [event for event in events if event.startswith("step")] == ["step 1", "step 2", "step 3", "step 4"]
    assert run.state["sum"] == 1 + 2 + 3 + 4
    assert [(line["step"], line["rla/loss"]) for line in read_metrics(tmp_path)] == [
        (i, float(i)) for i in (1, 2, 3, 4)
    ]
    events.clear()
    train(FakeRun(tmp_path, **{"train.steps": 4}), tmp_path)
    assert events == []  # nothing left to train


def test_not_a_number_stops_the_run_by_name_before_it_is_saved(tmp_path, events):
    with pytest.raises(
        NonFiniteError, match=r"step 5: loss or gradient of rla is not finite; .* checkpoint is 3"
    ) as error:
        train(FakeRun(tmp_path, **{"train.steps": 9, "train.checkpoint_every": 3}), tmp_path)
    assert "config.optimizer.learning_rate" in str(error.value) and "\n" not in str(error.value)
    assert Checkpointer(tmp_path, read_only=True).steps == [3]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_not_a_number_at_a_checkpoint_is_not_saved_either(tmp_path, events):
    with pytest.raises(NonFiniteError, match="step 5"):
        train(FakeRun(tmp_path, **{"train.steps": 9, "train.checkpoint_every": 5}), tmp_path)
    assert Checkpointer(tmp_path, read_only=True).steps == []


def test_a_run_on_another_backbone_is_refused(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 2}), tmp_path)
    run = FakeRun(tmp_path, **{"train.steps": 4})
    run.meta["fingerprint"] = "xyz"
    with pytest.raises(ValueError, match=r"checkpoints/2: expected backbone abc as when saved, found xyz; .*--workdir"):
        train(run, tmp_path)
    assert run.state["sum"] == 0


def test_only_every_nth_step_is_logged(tmp_path, events):
    train(FakeRun(tmp_path, **{"train.steps": 4, "train.log_every": 2}), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]
