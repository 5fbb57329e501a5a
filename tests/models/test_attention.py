"""Every kernel computes the same attention, is asked for where it exists, and is what the lowered program calls."""

import importlib.util
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.compile_check import COMPILER_ALONE
from rlawm_jax.compile_check import check
from rlawm_jax.compile_check.abstract_programs import abstract_model
from rlawm_jax.models import attention
from rlawm_jax.models.attention import attend, cudnn_refuses
from rlawm_jax.models.layers import Attention
from rlawm_jax.sharding import make_mesh, on_mesh
from tests.tiny_models import tiny_config

H100 = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
BF16 = jnp.bfloat16


def arrays(queries: int, keys: int, dtype=jnp.float32, width: int = 16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, n, 2, width)), dtype) for n in (queries, keys, keys)]


def value_and_gradients(kernel: str, query, key, value):
    def scalar(query, key, value):
        y = attend(query, key, value, kernel).astype(jnp.float32)
        return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]


def lowered(kernel: str, given: list[jax.Array], platform: str) -> str:
    function = jax.jit(lambda *given: attend(*given, kernel))
    return function.trace(*given).lower(lowering_platforms=(platform,)).as_text()


def test_the_flash_kernel_computes_what_xla_does_with_gradients_and_padding():
    given = arrays(128, 130)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients("flash", *given)
    for ours, theirs in zip(found, value_and_gradients("xla", *given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(32, 1024), (1056, 1056), (33, 1029)])
def test_cudnns_kernel_computes_what_xla_does_with_gradients(queries, keys):
    given = arrays(queries, keys, BF16, 64)
    assert "fmha" in lowered("auto", given, "cuda")
    for ours, theirs in zip(value_and_gradients("cudnn", *given), value_and_gradients("xla", *given), strict=True):
        # both round probabilities and results to eight bits, after sums in another order
        assert np.abs(ours - theirs).max() < 2**-6 * np.abs(theirs).max()


def test_on_a_gpu_bfloat16_is_cudnns_and_float32_is_xlas(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention.jax, "devices", lambda: [H100])
    assert "__cudnn$fmhaSoftmax" in lowered("auto", arrays(40, 24, BF16), "cuda")
    exact = arrays(40, 24)
    assert lowered("auto", exact, "cuda") == lowered("xla", exact, "cuda")


def test_without_a_gpu_auto_is_xla():
    given = arrays(4, 3, BF16)
    assert lowered("auto", given, "cpu") == lowered("xla", given, "cpu")


def test_the_tpus_program_calls_the_flash_kernel_where_there_are_enough_tokens():
    assert "tpu_custom_call" in lowered("flash", arrays(1056, 1056, BF16, 64), "tpu")
    few = arrays(32, 1024, BF16, 64)
    assert lowered("flash", few, "tpu") == lowered("xla", few, "tpu")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (launch/requirements-tpu.txt)")
def test_the_tpu_compiler_takes_the_flash_kernel_on_a_mesh_and_needs_less_memory(monkeypatch):
    for name, value in COMPILER_ALONE.items():
        monkeypatch.setenv(name, value)
    mesh = make_mesh(2, 1, 2, check.devices_of("v5e-4"))
    split = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    given = [jax.ShapeDtypeStruct((16, 1056, 16, 64), BF16, sharding=split)] * 3
    needed = {}
    for kernel in ("xla", "flash"):
        scalar = partial(lambda kernel, *given: attend(*given, kernel).astype(jnp.float32).sum(), kernel)
        program = jax.jit(on_mesh(jax.grad(scalar, argnums=(0, 1, 2)), mesh)).lower(*given).compile()
        needed[kernel] = program.memory_analysis().temp_size_in_bytes / 2**30
    print(needed)
    assert needed["flash"] < 0.7 * needed["xla"]


def test_every_device_runs_the_flash_kernel_on_its_own_rows_and_heads():
    abstract = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    mesh = types.SimpleNamespace(size=8, abstract_mesh=abstract)
    shape = partial(jax.ShapeDtypeStruct, dtype=BF16)
    program = jax.make_jaxpr(on_mesh(partial(attend, kernel="flash"), mesh))
    text = str(program(*[shape((8, 128, 4, 64))] * 3))
    assert re.search(r"bf16\[2,2,128,64\] = (custom_vjp_call|jit)", text)
    # neither three rows nor three heads split
    assert re.search(r"bf16\[3,3,128,64\] = (custom_vjp_call|jit)", str(program(*[shape((3, 128, 3, 64))] * 3)))


@pytest.mark.parametrize(
    ("dtype", "width", "device", "reason"),
    [
        (jnp.float32, 64, H100, "config.dtype=bfloat16, found float32"),
        (BF16, 12, H100, "heads whose width is a multiple of 8 and at most 128, found 12"),
        (BF16, 64, types.SimpleNamespace(compute_capability="7.5"), "an NVIDIA GPU of compute capability 8.0 or newer"),
        (BF16, 64, types.SimpleNamespace(compute_capability="gfx90a"), "an NVIDIA GPU of compute"),
        (BF16, 64, types.SimpleNamespace(platform="cpu"), "an NVIDIA GPU of compute"),
        (BF16, 64, H100, ""),
    ],
)
def test_cudnn_is_used_only_where_it_takes_the_arrays(dtype, width, device, reason):
    query = jax.ShapeDtypeStruct((2, 5, 2, width), dtype)
    assert cudnn_refuses(query, device).startswith(reason) and bool(reason) == bool(cudnn_refuses(query, device))


def test_cudnn_for_float32_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^config\.attention=cudnn: expected config\.dtype=bfloat16, found float32;"):
        attend(*arrays(4, 4), "cudnn")


def test_the_setting_reaches_every_attention_of_the_world_model():
    model = abstract_model(tiny_config(attention="cudnn"), with_backbone=True)
    found = [module.kernel for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    # backbone, both halves of the RLA autoencoder, a condition block, and two in a flow block
    assert found == ["cudnn"] * 6
