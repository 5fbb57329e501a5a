"""Cluster files: scripts that parse and print what they would run, a consistent manifest, commands that exist."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [LAUNCH / "tpu" / "pod.sh", LAUNCH / "slurm" / "train.sbatch"]
HERE = ["--name=pod", "--zone=here"]


def bash(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_explains_itself(script):
    assert bash("-n", script).returncode == 0
    done = bash(script, "--help")
    assert done.returncode == 0 and script.name in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("create", "queued-resources create pod --node-id=pod --accelerator-type=v5litepod-16"),
        ("install", "tpu-vm ssh pod --worker=all"),
        ("logs", "tpu-vm ssh pod --worker=0"),
        ("stop", "kill -TERM"),
        ("delete", "queued-resources delete pod --force"),
    ],
)
def test_a_verb_shows_the_command_it_would_run(verb, expected):
    done = bash(SCRIPTS[0], verb, *HERE, "--print")
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and "--zone=here" in done.stdout


def test_training_passes_its_arguments_through_the_remote_shell():
    done = bash(SCRIPTS[0], "train", *HERE, "--print", "--", "--config=c.py", "--workdir=/a b")
    assert "-m launch.train --distributed --config=c.py --workdir=/a\\ b" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dream"], "expected create, install, train, logs, stop or delete, found 'dream'"),
        (["create", "--zone=here"], "--name: expected the name"),
        (["create", *HERE, "--spotty"], "unknown option --spotty"),
        (["train", *HERE, "--print"], "found nothing after --"),
        (["train", *HERE, "--print", "--", "--config=c.py"], "expected --workdir=DIR"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    done = bash(SCRIPTS[0], *arguments)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_slurm_script_refuses_to_run_outside_a_job():
    done = bash(SCRIPTS[1], "--config=c.py")
    assert done.returncode == 1 and done.stderr.startswith("error: expected to run inside a Slurm job")


def test_the_manifest_is_consistent():
    manifest = yaml.safe_load((LAUNCH / "gke" / "train.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert manifest["kind"] == "JobSet" and job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    sides = re.findall(r"\d+", pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"])
    assert chips == int(sides[0]) * int(sides[1])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "--distributed" in container["args"]


@pytest.mark.parametrize("folder", ["tpu", "gke", "slurm"])
def test_every_command_of_a_page_exists(folder):
    text = (LAUNCH / folder / "README.md").read_text()
    modules = set(re.findall(r"python -m launch\.(\w+)", text)) | {"train"}
    files = set(re.findall(r"launch/[\w/]+\.\w+", text))
    assert all((LAUNCH / f"{module}.py").is_file() for module in modules)
    assert files and all((LAUNCH.parent / file).is_file() for file in files)
