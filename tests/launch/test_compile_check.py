"""Will it fit: the table for local devices and for an absent TPU, and one line for each misspelling."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from configs import rl
from rlawm_jax.compile_check import check, cost
from rlawm_jax.compile_check.abstract_programs import PROGRAMS
from tests.tiny_models import tiny_config
from tests.tiny_policy import policy_config

ROOT = Path(__file__).parents[2]
WITHOUT_PICTURES = {"objectives__image_decoder__enabled": False, "data__source": "tokens", "data__batch_size": 16}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.compile_check", "--config=configs/pusht.py:debug", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def recipes(program: str) -> dict[str, ConfigDict]:
    """What the RL iteration needs in addition: the smallest policy, four environments of two observations."""
    if program != "rl":
        return {}
    small = rl.get_config()
    small.residual.update({"hidden": (12, 6), "critic_hidden": (10, 5), "lora_rank": 2})
    small.ppo.update({"num_envs": 4, "num_steps": 2, "minibatch": 4})
    small.sampler.steps = 2
    return {"rl": small, "policy": policy_config()}


@pytest.mark.parametrize(
    "program", ["sample", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train", "rl"))]
)
def test_a_program_compiles_for_local_devices(program):
    config = tiny_config(**WITHOUT_PICTURES)
    costs = check.check(config, check.LOCAL, jax.devices()[:1], program, **recipes(program))
    assert costs.fits == "unknown"  # a CPU's memory is not counted
    assert costs.memory.arguments >= sum(costs.arguments.values()) > 0
    assert costs.flops > 0 and costs.traffic == {}
    lines = check.table([costs.cells()]).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_flops_grow_with_the_batch_and_not_with_remat():
    def flops(**overrides) -> int:
        program = PROGRAMS["train"](tiny_config(**WITHOUT_PICTURES | overrides), mesh)
        return cost.matmul_flops(program.function.trace(*program.arguments).jaxpr.jaxpr)

    mesh = check.make_mesh(1, 1, 1, jax.devices()[:1])
    once, twice = flops(), flops(data__batch_size=32)
    assert 1.9 < twice / once <= 2
    assert flops(train__accumulate=2) == once
    assert 1.05 < flops(remat="full") / once < 4 / 3


def verdict(**changes) -> str:
    facts = {"memory": cost.Memory(5, 1, 4), "capacity": 10, "refusal": "", "flops": 0, "traffic": {}, "seconds": 0.0}
    return check.Fit("m", "b", "train", "1", {}, **facts | changes).fits


def test_the_verdict_is_the_compilers_or_the_sum():
    assert verdict() == "yes"
    assert verdict(capacity=9) == "no"
    assert verdict(capacity=None) == verdict(memory=None) == "unknown"
    assert verdict(memory=None, refusal="used 20g of 16g hbm") == "no: used 20g of 16g hbm"


@pytest.mark.parametrize("name", ["v5e16", "v5e:4", "tpu", "v5e:4x4x"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(ValueError, match=r"--topology: expected local, v5e-4, .* or kind:shape such as v5e:4x4, found"):
        check.devices_of(name)


def test_without_the_compiler_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--topology=v5e-16: .* found none; pip install -r launch/requirements-tpu\.txt"
    ):
        check.devices_of("v5e-16")


def test_a_program_or_backbone_that_does_not_exist_is_one_line():
    for arguments, message in (
        (["--program=dream"], "error: --program: expected some of train, rl, sample, found 'dream'"),
        (["--backbone=dinov9"], "error: backbone 'dinov9' is unknown"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_rows_are_kept_and_read_again_from_a_truncated_file(tmp_path):
    file = tmp_path / "new" / "check.jsonl"
    rows = check.Rows(file)
    rows.put("a", ("1", "2"))
    rows.put("b", ("3", "4"))
    file.write_text(file.read_text() + '{"key": "c", "cel')
    rows = check.Rows(file)
    assert rows.get("a") == ["1", "2"] and rows.get("b") == ["3", "4"] and rows.get("c") is None
    rows.put("c", ("5", "6"))
    assert check.Rows(file).get("c") == ["5", "6"]
    assert check.Rows(None).get("a") is None


def test_a_row_stands_for_every_setting():
    def key(machine="v5e-16", slices=1, program="rl", recipes=None, **overrides) -> str:
        return check.row_key(machine, slices, program, tiny_config(**overrides), recipes or {})

    other = rl.get_config()
    other.ppo.num_envs = 8
    keys = [key(), key("v5e-64"), key(slices=2), key(program="train"), key(remat="full"), key(recipes={"rl": other})]
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_rows_are_read_too_if_jax_has_no_option_for_the_compilers_effort(monkeypatch):
    monkeypatch.setattr(jax, "config", SimpleNamespace())
    assert check.row_key("local", 1, "train", tiny_config(), {}).startswith("local x 1")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (launch/requirements-tpu.txt)")
def test_the_small_model_compiles_for_a_tpu_pod_by_the_tpu_compiler(tmp_path):
    table = tmp_path / "check.jsonl"
    settings = ["--config.mesh.fsdp=2", "--config.objectives.image_decoder.enabled=False"]
    settings += ["--rl_config.ppo.num_envs=8", "--rl_config.ppo.minibatch=16", "--policy_config.policy.image_size=32"]
    settings += ["--topology=v5e:2x2", f"--table={table}", "--backbone=dinov2_vits14"]
    for programs in ("train,sample", "train,rl,sample"):  # the second time two are there already
        done = run(*settings, f"--program={programs}")
        assert done.returncode == 0, done.stderr
        rows = [line for line in done.stdout.splitlines() if line.startswith("| v5e:2x2")]
        assert [row.split(" | ")[2] for row in rows] == programs.split(",")
        for row in rows:
            assert "| data 2 x fsdp 2 | yes |" in row and "of 15.75" in row
    assert len(table.read_text().splitlines()) == 3
