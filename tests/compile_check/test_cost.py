"""FLOPs counted by hand, collectives read from a program's text, memory as the shardings imply."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlawm_jax.compile_check import cost
from rlawm_jax.sharding import make_mesh

HLO = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = f32[64,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %reduced = (f32[8,4]{1,0}, bf16[2]{0}) all-reduce(%y, %z), channel_id=2, to_apply=%add
  ROOT %out = (s32[], f32[8,4]) tuple(%i, %r)
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %l = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %start = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), channel_id=3, dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %sent = (f32[4,6]{1,0}, f32[4,6]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=4
  ROOT %last = f32[8,4] get-tuple-element(%l), index=1, metadata={op_name="not an all-gather(call)"}
}
"""


# as the TPU compiler writes loops and reduce-scatters
TPU = """HloModule jit_step, is_scheduled=true

%wide.condition (p: (s32[], f32[16,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (g: f32[16,8]) -> f32[4,8] {
  %g = f32[16,8]{1,0:T(8,128)} parameter(0)
  %sum = f32[16,8]{1,0:T(8,128)} all-reduce(%g), channel_id=6, to_apply=%add
  ROOT %own = f32[4,8]{1,0:T(8,128)S(1)} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={4,8}
}

%wide.body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %whole = bf16[1,8,8]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=7, dimensions={1}
  %own = f32[4,8]{1,0:T(8,128)S(1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)}) tuple(%i, %r)
}

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %l = (s32[]{:T(128)}, f32[16,8]{1,0:T(8,128)S(1)}) while(%init), condition=%wide.condition, body=%wide.body
  ROOT %last = f32[16,8] get-tuple-element(%l), index=1
}
"""


class Text:
    """A compiled program that has only text."""

    def __init__(self, text: str = HLO):
        self.text = text

    def as_text(self) -> str:
        return self.text


def test_a_tpu_program_is_counted_by_its_loops_bounds_and_scatters():
    traffic = cost.collectives(Text(TPU))
    assert traffic == {"all-gather": (12, 12 * 8 * 8 * 2), "reduce-scatter": (12, 12 * 4 * 8 * 4)}
    once = {"all-gather": (1, 8 * 8 * 2), "reduce-scatter": (1, 4 * 8 * 4)}
    assert cost.collectives(Text(TPU.replace("direction=LT", "direction=NE"))) == once  # who knows how often


def test_collectives_are_counted_as_often_as_their_loop_runs():
    traffic = cost.collectives(Text())
    assert traffic["all-gather"] == (12 + 1, 12 * 64 * 4 * 4 + 16 * 4)
    assert traffic["all-reduce"] == (12, 12 * (8 * 4 * 4 + 2 * 2))
    assert traffic["collective-permute"] == (1, 4 * 6 * 4)
    assert traffic.keys() == {"all-gather", "all-reduce", "collective-permute"}


def flops(fn, *shapes) -> int:
    return cost.matmul_flops(jax.make_jaxpr(fn)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_flops_are_those_of_products_and_convolutions():
    product = 2 * 3 * 4 * 5
    assert flops(lambda a, b: a @ b, (3, 4), (4, 5)) == product
    assert flops(jax.jit(lambda a, b: jnp.tanh(a @ b) + 1), (3, 4), (4, 5)) == product
    assert flops(lambda a, b: jnp.einsum("bhd,bld->bhl", a, b), (7, 3, 4), (7, 5, 4)) == 7 * product
    square = 2 * 4**3
    loop = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]  # noqa: E731
    assert flops(loop, (4, 4), (4, 4)) == 6 * square
    # forward, its recomputation, and two products for each forward one
    gradient = jax.grad(lambda w, x: jax.checkpoint(loop)(x, w).sum())
    assert flops(gradient, (4, 4), (4, 4)) == 4 * 6 * square
    branches = lambda p, x: jax.lax.cond(p[0] > 0, lambda: x @ x, lambda: x)  # noqa: E731
    assert flops(branches, (1,), (4, 4)) == square
    convolution = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops(convolution, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 8 * 8 * 5 * 3 * 3 * 3


def test_memory_is_that_of_the_compiled_program():
    sharding = NamedSharding(make_mesh(1, 1, 1, jax.devices()[:1]), P())
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
    assert cost.bytes_per_device({"x": x, "y": x}) == 2 * 256 * 256 * 4
    plain = cost.memory(jax.jit(lambda x: x + 1).lower(x).compile())
    assert plain.arguments == plain.outputs == 256 * 256 * 4
    donated = cost.memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert donated.outputs == 0 and donated.total < plain.total


def test_only_running_out_of_memory_is_a_verdict():
    refused = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.55G of 15.75G hbm. Exceeded"
    )
    assert cost.out_of_memory(refused) == "used 20.55g of 15.75g hbm"
    with pytest.raises(RuntimeError, match="unheard of"):
        cost.out_of_memory(RuntimeError("INTERNAL: unheard of"))
