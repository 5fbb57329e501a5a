"""The lock of a run folder: one writer at a time, and a dead owner's lock is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlawm_jax.run_folder import lock
from rlawm_jax.run_folder.lock import LOCK_FILE, RunLock, RunLockError

HOLDER = """
import sys, time
from pathlib import Path
from rlawm_jax.run_folder.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_owner_is_named_and_a_dead_owners_lock_is_taken_over(holder, tmp_path, capsys):
    with pytest.raises(RunLockError, match=f"found process {holder.pid} on .*, holding it for 0 min; wait") as error:
        RunLock(tmp_path).__enter__()
    assert "\n" not in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"taking over from process {holder.pid}" in capsys.readouterr().err


def test_a_released_lock_is_free_and_nothing_is_printed(tmp_path, capsys):
    for _ in range(2):
        with RunLock(tmp_path / "run"), pytest.raises(RunLockError):
            RunLock(tmp_path / "run").__enter__()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_kernel_lock_cannot_tell_the_heartbeat_decides(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.4)
    path, owner = tmp_path / LOCK_FILE, {"host": "elsewhere", "pid": 7, "since": time.time(), "beat": 3}
    path.write_text(json.dumps(owner))
    real, reads = lock._read, []

    def read(path):
        reads.append(path)
        return real(path) | ({"beat": len(reads)} if alive else {})

    monkeypatch.setattr(lock, "_read", read)
    if alive:
        with pytest.raises(RunLockError, match="process 7 on elsewhere"):
            RunLock(tmp_path).__enter__()
    else:
        with RunLock(tmp_path):
            assert real(path)["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00" * 40, '{"host": 3}'])
def test_a_damaged_lock_file_is_ignored(tmp_path, content, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    (tmp_path / LOCK_FILE).write_text(content)
    with RunLock(tmp_path):
        pass
