"""What the simulated datasets share: the names of their builds, and what a person reads who lacks a simulator."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.schema import EpisodeError
from data.simulated import SimulatedBuilder

ROOT = Path(__file__).parents[2]
BUILD = """
import runpy, sys
sys.modules[sys.argv.pop(1)] = None
runpy.run_module("data.build", run_name="__main__", alter_sys=True)
"""


class Toy(SimulatedBuilder, skip_registration=True):
    texts = {"play": "play", "push": "push it"}  # noqa: RUF012


def test_a_build_is_named_after_what_it_holds_and_has_all_splits_unless_told_otherwise():
    assert Toy.config_of(112).name == "112px"
    assert Toy.config_of(112).splits == ("play", "push")
    chosen = Toy.config_of(64, splits="push", limit=3, workers=2)
    assert (chosen.name, chosen.splits, chosen.limit, chosen.workers) == ("64px_push_first3", ("push",), 3, 2)


def test_an_unknown_split_is_one_line():
    with pytest.raises(EpisodeError) as error:
        Toy.config_of(112, splits="push,pull")
    assert str(error.value) == "--only: expected splits among play, push, found pull"


@pytest.mark.parametrize(
    ("name", "package", "fix"),
    [
        ("pusht", "shapely", "requirements-demo.txt"),
        ("panda", "pybullet", 'on Python 3.11; for newer ones see "Versions" in launch/README.md'),
        ("maniskill", "h5py", "requirements-data.txt"),
        ("maniskill_native", "h5py", "requirements-data.txt"),
        ("iws", "h5py", "requirements-data.txt"),
    ],
)
def test_a_build_without_a_package_is_one_line_with_the_fix(tmp_path, name, package, fix):
    where = f"--data_dir={tmp_path / 'datasets'}", f"--source={tmp_path}"
    command = [sys.executable, "-c", BUILD, package, name, *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"data.build: {name}: expected the package {package}, found none; pip install")
    assert done.stderr.rstrip().endswith(fix)
    assert not (tmp_path / "datasets").exists()
