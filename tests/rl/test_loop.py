"""What happens to a run folder of reinforcement learning: the same as to one of training (tests/training/test_loop.py).

In the toy world, with programs that are compiled once for all tests.
"""

import errno
import json
import signal
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlawm_jax.evaluation.closed_loop import load_imagined
from rlawm_jax.rl import loop as rl_loop
from rlawm_jax.rl.loop import train
from rlawm_jax.rl.setup import RLRun
from rlawm_jax.run_folder import checkpoint
from rlawm_jax.run_folder.checkpoint import Checkpointer, CheckpointError
from rlawm_jax.run_folder.lock import RunLock, RunLockError
from rlawm_jax.run_folder.signals import Interrupt
from rlawm_jax.training import loop
from rlawm_jax.training.loop import NonFiniteError
from tests.rl.toy_run import toy_config, toy_run
from tests.tiny_run import read_metrics

compile_step, imagined_returns = RLRun.compile_step, rl_loop.imagined_returns


@cache
def program(on_nonfinite: str):
    """The guarded call of two iterations."""
    return compile_step(toy_run(toy_config(on_nonfinite=on_nonfinite)), {})


@cache
def measure():
    """Imagined returns on the one bank there is."""
    run = toy_run(toy_config())
    return imagined_returns(run, run.held_out)


class Events(list):
    """Iterations before each call; which of these calls finds no numbers in its bank; what to do during one."""

    def __init__(self):
        super().__init__()
        self.broken, self.at = set(), {}


@pytest.fixture(autouse=True)
def events(monkeypatch) -> Events:
    happened = Events()

    def compile_once(run, batch):
        call = program(run.config.train.on_nonfinite)

        def watched(state, frozen, batch):
            before = int(state.iteration)
            happened.append(before)
            happened.at.get(before, lambda: None)()
            if before in happened.broken:
                nothing = jnp.full_like(frozen.bank.data, jnp.nan)
                frozen = frozen._replace(bank=frozen.bank._replace(data=nothing))
            return call(state, frozen, batch)

        return watched

    monkeypatch.setattr(RLRun, "compile_step", compile_once)
    monkeypatch.setattr(rl_loop, "imagined_returns", lambda run, bank: measure())
    return happened


def saved(workdir) -> list[int]:
    return Checkpointer(workdir, read_only=True).steps


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(run, its folder) that nothing disturbed."""
    workdir, run = tmp_path_factory.mktemp("unbroken"), toy_run(toy_config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RLRun, "compile_step", lambda run, batch: program("stop"))
        patch.setattr(rl_loop, "imagined_returns", lambda run, bank: measure())
        train(run, workdir)
    return run, workdir


def same_as(unbroken, run, workdir) -> None:
    """State, metrics and imagined returns, bit for bit."""
    whole, folder = unbroken
    jax.tree.map(np.testing.assert_array_equal, run.state, whole.state)
    assert read_metrics(workdir) == read_metrics(folder)
    assert load_imagined(workdir) == load_imagined(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_call_at_hand_and_the_run_goes_on_bit_for_bit(tmp_path, events, unbroken, number):
    events.at[2] = partial(signal.raise_signal, number)
    with pytest.raises(SystemExit) as ended:
        train(toy_run(toy_config(checkpoint_every=8)), tmp_path)
    assert ended.value.code == 128 + number
    assert saved(tmp_path) == [4] and load_imagined(tmp_path) is None
    events.at.clear()
    run = toy_run(toy_config(checkpoint_every=8))
    train(run, tmp_path)
    assert events == [0, 2, 4, 6]
    same_as(unbroken, run, tmp_path)


def test_calls_are_counted_one_by_one(tmp_path, monkeypatch):
    """The processes of a cluster stop at the latest call that one has reached plus one, which has to come."""
    asked = []
    monkeypatch.setattr(Interrupt, "requested", lambda self, call: asked.append(call))
    train(toy_run(toy_config()), tmp_path)
    assert asked == [1, 2, 3, 4]


def test_iterations_of_a_call_are_logged_one_by_one(unbroken):
    metrics = read_metrics(unbroken[1])
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert len({line["rl/reward"] for line in metrics}) == 8
    assert not any("finite" in name for line in metrics for name in line)


@pytest.mark.parametrize("every", [2, 4, 8])
def test_not_a_number_stops_with_the_state_before_the_call_saved_and_resumes(tmp_path, events, unbroken, every):
    events.broken = {4}
    with pytest.raises(NonFiniteError, match=r"iteration 5: the value of .*rl/reward.* is not finite; ") as error:
        train(toy_run(toy_config(checkpoint_every=every)), tmp_path)
    assert "the state of iteration 4 is saved; lower config.ppo.learning_rate" in str(error.value)
    assert "\n" not in str(error.value)
    assert saved(tmp_path)[-1] == 4
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    events.broken, run = set(), toy_run(toy_config(checkpoint_every=every))
    train(run, tmp_path)  # it was a cosmic ray
    same_as(unbroken, run, tmp_path)


def test_not_a_number_in_the_first_call_saves_nothing(tmp_path, events):
    events.broken = {0}
    with pytest.raises(NonFiniteError, match=r"iteration 1: .*; nothing before it could be saved; lower"):
        train(toy_run(toy_config()), tmp_path)
    assert saved(tmp_path) == []


def test_calls_that_are_not_numbers_can_be_skipped_and_are_counted(tmp_path, events, capsys):
    events.broken = {2, 6}
    run = toy_run(toy_config(on_nonfinite="skip"))
    train(run, tmp_path)
    assert events == [0, 2, 4, 6] and int(run.state.iteration) == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state))
    assert "rl/reward" in (told := capsys.readouterr().err)
    assert "is not finite: 2 iterations skipped (4 so far)" in told
    # nothing of the last call was kept but the count
    before, after = (Checkpointer(tmp_path, read_only=True).arrays(i, state=run.state)["state"] for i in (6, 8))
    jax.tree.map(np.testing.assert_array_equal, before._replace(iteration=after.iteration), after)


def test_skipping_without_end_is_a_stop(tmp_path, events, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 4)
    events.broken = set(range(4, 90))
    with pytest.raises(NonFiniteError, match=r"[46] iterations in a row .*; lower config\.ppo\.learning_rate"):
        train(toy_run(toy_config(iterations=90, on_nonfinite="skip")), tmp_path)
    assert 8 <= saved(tmp_path)[-1] <= 10


def test_a_full_disk_does_not_stop_the_run_and_older_checkpoints_stay(tmp_path, events, unbroken, monkeypatch, capsys):
    write = checkpoint.write_manifest

    def full(folder):
        if folder.name.startswith(("4", "6")):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    run = toy_run(toy_config())
    train(run, tmp_path)
    told = capsys.readouterr().err
    assert all(f"NOT SAVED, training goes on: checkpoint {tmp_path}/checkpoints/{i}" in told for i in (4, 6))
    assert saved(tmp_path) == [2, 8]
    same_as(unbroken, run, tmp_path)


def test_a_disk_that_stays_full_is_an_error_at_the_end(tmp_path, events, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"8: could not be written: .*No space left on device"):
        train(toy_run(toy_config()), tmp_path)
    assert events == [0, 2, 4, 6] and saved(tmp_path) == []
    monkeypatch.undo()


def test_metrics_that_cannot_be_written_do_not_stop_the_run(tmp_path, events, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.MetricLogger, "write", full)
    train(toy_run(toy_config()), tmp_path)
    assert saved(tmp_path)[-1] == 8
    assert "iteration 3: metrics not written" in capsys.readouterr().err


def test_a_second_job_in_the_folder_is_refused(tmp_path, events):
    with RunLock(tmp_path), pytest.raises(RunLockError, match="expected a run folder that no other process trains in"):
        train(toy_run(toy_config()), tmp_path)
    assert events == [] and not (tmp_path / "checkpoints").exists()


def test_checkpoints_of_every_nth_iteration_stay_for_good(tmp_path):
    train(toy_run(toy_config(keep_checkpoints=1, keep_every=4)), tmp_path)
    assert saved(tmp_path) == [4, 8]


def test_a_damaged_newest_checkpoint_costs_an_interval(tmp_path, events, unbroken, capsys):
    train(toy_run(toy_config(iterations=4)), tmp_path)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_text("{}")
    run = toy_run(toy_config())
    train(run, tmp_path)
    assert events == [0, 2, 2, 4, 6]
    told = capsys.readouterr().err
    assert "meta/metadata has 2 bytes" in told and "1 restarts, 2 steps done again" in told
    same_as(unbroken, run, tmp_path)


def test_goodput_counts_iterations_over_restarts(tmp_path):
    train(toy_run(toy_config(iterations=4)), tmp_path)
    train(toy_run(toy_config()), tmp_path)
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert (account["step"], account["restarts"], account["steps_redone"]) == (8, 1, 0)
    assert account["session_steps"] == 4 and account["seconds"]["steps"] > 0


def test_a_finished_run_measures_nothing_again(tmp_path, events, monkeypatch, capsys):
    train(toy_run(toy_config()), tmp_path)
    returns = load_imagined(tmp_path)
    monkeypatch.setattr(rl_loop, "imagined_returns", None)
    events.clear()
    train(toy_run(toy_config()), tmp_path)
    assert events == [] and load_imagined(tmp_path) == returns
    assert "nothing to train: iteration 8 of 8 is saved" in capsys.readouterr().err


def test_a_run_killed_between_its_last_checkpoint_and_its_imagined_returns_makes_up_for_them(tmp_path, unbroken):
    train(toy_run(toy_config()), tmp_path)
    (tmp_path / "imagined_returns.json").unlink()
    run = toy_run(toy_config())
    train(run, tmp_path)
    same_as(unbroken, run, tmp_path)


def test_a_folder_of_another_policy_is_refused(tmp_path):
    train(toy_run(toy_config(iterations=2)), tmp_path)
    config = toy_config()
    config.policy = "another"
    with pytest.raises(ValueError, match=r"config\.policy: expected a clone, .* found another; .* --workdir") as error:
        train(toy_run(config), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["seed", "world_model", "bank"])
def test_a_folder_of_another_seed_world_model_or_bank_is_refused(tmp_path, key):
    started = {"seed": 0, "world_model": "one of step 3", "bank": {"pusht:demo": "abc"}}
    train(toy_run(toy_config(iterations=2), **started), tmp_path)
    with pytest.raises(ValueError, match=rf"config\.{key}: expected .*, which the run .* found .* --workdir") as error:
        train(toy_run(toy_config(), **started | {key: "another"}), tmp_path)
    assert "\n" not in str(error.value) and saved(tmp_path) == [2]
    train(toy_run(toy_config(iterations=4), **started), tmp_path)
    assert saved(tmp_path) == [2, 4]


def test_a_folder_from_before_these_were_stored_goes_on(tmp_path):
    train(toy_run(toy_config(iterations=2)), tmp_path)
    train(toy_run(toy_config(iterations=4), seed=0, world_model="one of step 3"), tmp_path)
    assert saved(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"iterations": 9}, "checkpoint_every=4 and iterations=9"),
        ({"checkpoint_every": 3}, "checkpoint_every=3 and iterations=8"),
        ({"iterations_per_call": 4}, "checkpoint_every=4 and iterations=8 and the 2 iterations saved"),
    ],
)
def test_calls_that_do_not_fit_are_one_line(tmp_path, settings, numbers):
    train(toy_run(toy_config(iterations=2)), tmp_path)
    run = toy_run(toy_config(**{"checkpoint_every": 4, **settings}))
    with pytest.raises(ValueError, match=rf"iterations_per_call: expected a divisor of {numbers}, found"):
        train(run, tmp_path)


def test_checkpoints_are_laid_out_as_they_always_were(unbroken):
    """A run folder of an earlier version has to go on: names of the state, and what stands for the data's position."""
    workdir = unbroken[1]
    assert Checkpointer(workdir, read_only=True).data(8) == {"policy": "a clone"}
    names = set(ocp.PyTreeCheckpointer().metadata(workdir / "checkpoints" / "8" / "state").item_metadata.tree)
    assert names == {"iteration", "params", "opt_state", "env", "observation", "episode_return", "scale"}
