"""The command on a run: the page over HTTP, Ctrl-C, a dataset's simulator, one line for what a person gets wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from launch.imagine import simulator_of
from tests.interactive.tiny import Store
from tests.tiny_policy import shared_world

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(tiny_root):
    """The command on a tiny run; what a failed test leaves running is ended."""
    process = start(f"--workdir={shared_world(tiny_root)}", "--port=0")
    yield process
    process.kill()


def start(*arguments) -> subprocess.Popen:
    # where we ignore Ctrl-C, as a shell's background jobs do, the command would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.imagine", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_it_serves_a_run_until_ctrl_c_and_ends_well(started, tiny_root):
    line = started.stdout.readline()
    assert line.startswith("http://127.0.0.1:") and line.endswith("  (Ctrl-C ends it)\n"), started.communicate()
    url = line.split()[0]
    with urllib.request.urlopen(url) as page:
        assert f"{shared_world(tiny_root)}, step 1" in page.read().decode()
    with urllib.request.urlopen(f"{url}/state") as answer:
        before = json.load(answer)
    assert (before["dataset"], before["truth"]) == ("pusht:play", None)  # the tiny dataset has no states to replay
    row = [(low + high) / 2 for low, high in zip(before["controls"]["low"], before["controls"]["high"], strict=True)]
    with urllib.request.urlopen(f"{url}/step", json.dumps({"action": row}).encode()) as answer:
        assert json.load(answer)["steps"] == 1
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 0 and out == "" and "Traceback" not in err, err


def test_a_taken_port_is_one_line_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(f"--workdir={tmp_path / 'nowhere'}", f"--port={taken.getsockname()[1]}")
        err = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("error: --port: expected a free port, found ")


@pytest.mark.parametrize("reference", ["folder:play", "stick:play"])
def test_a_dataset_of_no_simulator_is_driven_in_the_model_alone(reference, capsys):
    store = Store()
    store.reference = reference
    assert simulator_of(store) is None
    assert f"{reference}: no simulator of ours; the model runs alone" in "".join(capsys.readouterr())


def test_a_simulator_that_is_not_installed_is_one_line_and_the_model_runs_alone(monkeypatch, capsys):
    # a loaded submodule would be found without its package
    for name in {"gym_pusht", *(name for name in sys.modules if name.startswith("gym_pusht."))}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith(("rlawm_jax.sim.pusht", "data.pusht"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(Store, "image_size", (28, 28), raising=False)
    monkeypatch.setattr(Store, "reference", "pusht:play")
    assert simulator_of(Store()) is None
    said = "".join(capsys.readouterr()).strip()
    assert "simulator pusht: expected the package gym_pusht" in said and said.endswith("; the model runs alone")


@pytest.mark.sim
@pytest.mark.parametrize(("action_dim", "name"), [(2, "pusht"), (4, None)])
def test_a_simulator_of_other_actions_is_not_the_datasets(action_dim, name, monkeypatch):
    monkeypatch.setattr(Store, "image_size", (28, 28), raising=False)
    monkeypatch.setattr(Store, "reference", "pusht/28px/1.0.0:demo")
    monkeypatch.setattr(Store, "action_dim", action_dim)
    simulator = simulator_of(Store())
    assert (simulator and simulator.task.simulator) == name
