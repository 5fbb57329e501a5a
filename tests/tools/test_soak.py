"""Each kind of fault once, against real processes (tests/tools/soak.py takes more, on demand)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.soak import KINDS


@pytest.mark.slow
def test_no_fault_of_the_process_or_its_disk_loses_anything():
    command = [sys.executable, "-m", "tests.tools.soak", f"--faults={len(KINDS)}", "--seed=1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    counts = {cells[1].strip(): cells[2:4] for cells in (row.split("|") for row in rows)}
    assert all(int(injected) == int(recovered) == 1 for injected, recovered in (counts[kind] for kind in KINDS))
