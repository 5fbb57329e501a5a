"""launch/venv.sh: which Python makes the environment, and how the arm's simulator gets into it.

Pythons are scripts that write down what they are asked for; nothing is installed.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "chmod", "cp", "cut", "grep", "mkdir", "sed", "sha256sum")
PYTHON = """#!/bin/bash
echo "$0 $*" >> calls
case "$*" in
  -V) echo Python {version} ;;
  "-m venv "*) mkdir -p $3/bin && cp "$0" $3/bin/python ;;
  *"import panda_gym"*) exit {without_arm} ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """machine(script) -> the finished script, on a machine with these Pythons and commands and nothing else."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    commands = tmp_path / "commands"
    commands.mkdir()
    for tool in TOOLS:
        (commands / tool).symlink_to(str(shutil.which(tool)))

    def run(script: str, pythons=("python3", "python3.11"), wheel=True, compiler=False, **environment):
        for name in pythons:
            version = "3.11.9" if name == "python3.11" else "3.13.0"
            (commands / name).write_text(PYTHON.format(version=version, without_arm=int(not wheel)))
            (commands / name).chmod(0o755)
        if compiler:
            (commands / "c++").symlink_to("/bin/true")
        environment |= {"PATH": str(commands), "HOME": str(tmp_path)}
        source = f"set -euo pipefail; source launch/venv.sh; use_venv requirements.txt; {script}"
        command = ["bash", "-c", source]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("pythons", "environment", "version"),
    [
        (("python3", "python3.11"), {}, "3.11.9"),
        (("python3", "python3.11"), {"PYTHON": "python3"}, "3.13.0"),
        (("python3",), {}, "3.13.0"),
    ],
)
def test_a_new_environment_has_the_python_with_a_wheel_unless_told_otherwise(machine, pythons, environment, version):
    done = machine("", pythons, **environment)
    assert done.returncode == 0, done.stderr
    assert f"creating .venv with Python {version}" in done.stdout


def test_an_arm_that_is_installed_is_left_alone(machine, tmp_path):
    done = machine("use_arm")
    assert done.returncode == 0 and "building" not in done.stdout
    assert "isolation" not in (tmp_path / "calls").read_text()


def test_without_a_wheel_the_pinned_arm_is_built_where_it_finds_numpy_and_one_line_says_how_long(machine, tmp_path):
    done = machine("use_arm", ("python3",), wheel=False, compiler=True)
    assert done.returncode == 0 and not done.stderr
    lines = [line for line in done.stdout.splitlines() if "building PyBullet from source" in line]
    assert len(lines) == 1 and "minutes" in lines[0] and "Python 3.13.0 has no wheel" in lines[0]
    call = (tmp_path / "calls").read_text().splitlines()[-1]
    assert call.endswith("--no-build-isolation panda-gym==3.0.7 pybullet==3.2.7")


def test_without_a_wheel_and_a_compiler_one_line_says_how_to_go_on(machine, tmp_path):
    done = machine("use_arm", ("python3",), wheel=False)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: PyBullet: expected a wheel for Python 3.13.0") and done.stderr.count("\n") == 1
    )
    for way in ("Python 3.11", "g++ python3-dev", "--world=pusht"):
        assert way in done.stderr
    assert "isolation" not in (tmp_path / "calls").read_text()
