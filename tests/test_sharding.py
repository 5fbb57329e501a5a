"""Eight devices compute what one does, in pieces as the table says; meshes and batches that cannot be are refused."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from rlawm_jax.sharding import check_batch_size, keep_rows, leaf_spec, make_mesh, micro_batches, on_mesh
from rlawm_jax.training.loop import train
from rlawm_jax.training.setup import prepare
from tests.tiny_run import read_metrics, tiny_config
from tests.tools.multi_device import FRAME_SIZES, RECIPE, TOKEN_SIZES

MESHES = ["8x1x1", "2x4x1", "2x2x2"]


def on_eight_devices(what: str, folder: Path) -> dict:
    """Results of tests/tools/multi_device.py."""
    out = folder / "results.json"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.tools.multi_device", what, str(out)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict:
    return on_eight_devices("steps", tmp_path_factory.mktemp("devices"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_losses_and_parameters_of_one(eight, mesh):
    # float32 sums in another order: relative 2^-24 per addition, some thousands of additions, three steps
    for ours, one in zip(eight[mesh]["metrics"], eight["1x1x1"]["metrics"], strict=True):
        assert ours.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, err_msg=name)
    for name, value in eight["1x1x1"]["params"].items():
        np.testing.assert_allclose(eight[mesh]["params"][name], value, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_parameters_and_moments_are_in_pieces_as_the_table_says(eight):
    def pieces(mesh: str, ending: str) -> set[int]:
        counts = {n for name, n in eight[mesh]["pieces"].items() if name.endswith(ending) and "/rla/" in name}
        assert counts, ending
        return counts

    for leaf in ("query/kernel", "up/kernel", "out/kernel", "down/kernel"):
        assert pieces("8x1x1", leaf) == {1}  # replicas
        assert pieces("2x4x1", leaf) == {4}  # of parameters and of momenta alike
        assert pieces("2x2x2", leaf) == {4}
    assert pieces("2x2x2", "input_layer/kernel") == {2}
    assert pieces("2x2x2", "query/bias") == pieces("2x2x2", "norm_out/scale") == {1}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    return on_eight_devices("programs", tmp_path_factory.mktemp("programs"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1x1", "2x4x1", "2x2x2", "accumulated"])
def test_no_batch_of_tokens_is_gathered(compiled, mesh):
    for collective in compiled[mesh]["collectives"]:
        assert collective["kind"] != "all-gather" or not any(size in TOKEN_SIZES for size in collective["shape"]), (
            collective
        )


@pytest.mark.slow
def test_frames_stay_where_their_windows_are(compiled):
    moved = [collective for collective in compiled["frames"]["collectives"] if collective["kind"] != "all-reduce"]
    assert {collective["kind"] for collective in moved} == {"all-gather"}  # of kernels
    assert not [collective for collective in moved if any(size in FRAME_SIZES for size in collective["shape"])]


@pytest.mark.slow
def test_replicas_only_sum_and_only_sharded_parameters_are_gathered(compiled):
    kinds = {mesh: {collective["kind"] for collective in compiled[mesh]["collectives"]} for mesh in (*MESHES, "1x1x1")}
    assert kinds["1x1x1"] == set()
    assert kinds["8x1x1"] == {"all-reduce"}  # gradients and metrics
    assert "all-gather" in kinds["2x4x1"]  # parameters, where they are used


@pytest.mark.slow
def test_bytes_of_parameters_and_moments_fall_as_the_mesh_splits_them(compiled):
    whole = compiled["1x1x1"]
    assert compiled["8x1x1"]["parameters"] == whole["parameters"]
    for name in ("parameters", "optimizer"):
        # biases, norms and learned tokens stay whole: a tenth of these narrow networks
        assert whole[name] / 4 < compiled["2x4x1"][name] < whole[name] / 4 * 1.4
        assert whole[name] / 4 < compiled["2x2x2"][name] < whole[name] / 4 * 1.4


@pytest.mark.slow
def test_the_whole_recipe_on_a_mesh_equals_one_device_and_its_second_stage_runs(tiny_root, tmp_path):
    runs = on_eight_devices(str(tiny_root), tmp_path)
    config = tiny_config(tiny_root, **RECIPE)
    train(prepare(config, tmp_path), tmp_path)
    for ours, one in zip(runs["first"], read_metrics(tmp_path), strict=True):
        for name, value in one.items():
            # as above, and Adam turns rounding noise in a gradient near zero into steps of up to the learning rate
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    assert [line["step"] for line in runs["second"]] == [1, 2, 3]
    assert not any(name.startswith("rla/") for line in runs["second"] for name in line)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("/rla/encoder/blocks/attn/query/kernel", (12, 1024, 1024), P(None, "fsdp", "tensor")),
        ("/rla/encoder/blocks/attn/out/kernel", (12, 1024, 1024), P(None, "tensor", "fsdp")),
        ("/denoiser/flow_blocks/mlp/up/kernel", (8, 1024, 4096), P(None, "fsdp", "tensor")),
        ("/denoiser/flow_blocks/mlp/down/kernel", (8, 4096, 1024), P(None, "tensor", "fsdp")),
        ("/opt_state/rla/0/mu/encoder/blocks/attn/query/kernel", (12, 1024, 1024), P(None, "fsdp", "tensor")),
        ("/image_decoder/conv/kernel", (3, 3, 1024, 1024), P(None, None, "fsdp", None)),
        ("/rla/encoder/blocks/attn/query/kernel", (12, 1023, 1024), P(None, None, "tensor")),
        ("/rla/encoder/blocks/attn/query/kernel", (4, 4), P()),
        ("/rla/encoder/tokens", (1024, 1024), P(None, None)),
        ("/step", (), P()),
    ],
)
def test_a_leaf_is_split_by_its_name_and_only_where_it_divides_and_is_worth_it(name, shape, spec):
    assert leaf_spec(name, shape, AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))) == spec


@pytest.mark.parametrize("sizes", [(2, 1, 1), (-1, 3, 1), (-1, 0, 1), (1, -1, -1), (0, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match=rf"config\.mesh: data=.* x fsdp={sizes[1]} x tensor={sizes[2]} .*found 1"):
        make_mesh(*sizes, jax.devices()[:1])


@pytest.mark.parametrize(
    ("sizes", "shape"), [((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)), ((-1, -1, 2), (1, 4, 2))]
)
def test_one_axis_takes_what_the_others_leave(sizes, shape, monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *args, **kwargs: shape)
    devices = [types.SimpleNamespace(platform="cpu")] * 8
    assert make_mesh(*sizes, devices) == shape


def test_micro_batches_take_turns_over_the_rows():
    batch = {"x": np.arange(12).reshape(6, 2), "y": np.arange(6)}
    batches = micro_batches(batch, 3)
    np.testing.assert_array_equal(batches["y"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(batches["x"][:, :, 0], 2 * batches["y"])


def constraints(function, *shapes: tuple[int, ...]) -> list[P]:
    """How a program says that what it computes is split."""
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return [e.params["sharding"].spec for e in equations if e.primitive.name == "sharding_constraint"]


def test_rows_are_kept_on_a_mesh_and_unconstrained_without_one():
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    mesh = types.SimpleNamespace(size=8, abstract_mesh=mesh)
    assert constraints(on_mesh(keep_rows, mesh), (8, 3)) == [P(("data", "fsdp"))]
    assert constraints(on_mesh(lambda x: keep_rows(x, axis=1), mesh), (3, 8)) == [P(None, ("data", "fsdp"))]
    assert constraints(on_mesh(keep_rows, mesh), (6, 3)) == []  # for example an evaluation of six episodes
    assert constraints(keep_rows, (8, 3)) == []
    one = make_mesh(1, 1, 1, jax.devices()[:1])
    assert on_mesh(keep_rows, one) is keep_rows


def test_rows_are_kept_on_a_mesh_whose_axes_are_explicit():
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    mesh = types.SimpleNamespace(size=8, abstract_mesh=mesh)
    assert constraints(on_mesh(keep_rows, mesh), (8, 3)) == [P(("data", "fsdp"))]


def test_a_batch_that_does_not_split_evenly_is_refused():
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    check_batch_size(16, mesh)
    check_batch_size(16, mesh, accumulate=2)
    with pytest.raises(ValueError, match=r"expected a multiple of .* 8 devices x train\.accumulate = 32, found 16"):
        check_batch_size(16, mesh, accumulate=4)
    with pytest.raises(ValueError, match=r"config\.train\.accumulate: expected at least 1, found 0"):
        check_batch_size(16, mesh, accumulate=0)
    with pytest.raises(ValueError, match=r"config\.data\.batch_size: expected a multiple of .* 8 devices, found 12"):
        check_batch_size(12, mesh)
