"""DinoViT against transformers on random weights, stage by stage, and the properties of its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.vit import (
    VARIANTS,
    DinoViT,
    VitSpec,
    cubic_resize_matrix,
    rope_rotation,
    variant,
)
from rlawm_jax.weights.dino import backbone_tables
from rlawm_jax.weights.rules import choose_table, convert, flat_parameters, with_parameters

# depth 5 runs the scan, depth 2 the unrolled stack
SPECS = {
    "dinov2": VitSpec("dinov2", 14, 64, 5, 4, 256, False, 0, True, True, True, 1e-6, 4),
    "dinov2_gated": VitSpec("dinov2", 14, 48, 2, 3, 128, True, 0, True, True, True, 1e-6, 4),
    "dinov2_reg": VitSpec("dinov2", 14, 64, 2, 4, 256, False, 4, True, True, True, 1e-6, 4, True),
    "dinov3": VitSpec("dinov3", 16, 64, 5, 4, 256, False, 4, True, False, True, 1e-5, 0),
    "dinov3_gated": VitSpec("dinov3", 16, 64, 2, 4, 96, True, 4, False, False, False, 1e-5, 0),
}
# the position embedding was learned on 4x4 patches: its own size, larger, smaller than it, not square
GRIDS = {"native": (4, 4), "larger": (6, 7), "smaller": (3, 2)}
PARITY = [
    *[(name, grid) for name in ("dinov2", "dinov2_reg") for grid in GRIDS],
    ("dinov2_gated", "larger"),
    ("dinov3", "larger"),
    ("dinov3_gated", "smaller"),
]

# published sizes in millions: the tables of Meta's model cards for DINOv3; for DINOv2, whose card rounds to 21, 86,
# 300 and 1100, and for S+ and B of DINOv3, the model cards of timm
PUBLISHED_MILLIONS = {
    "dinov2_vits14": 22.1,
    "dinov2_vitb14": 86.6,
    "dinov2_vitl14": 304.4,
    "dinov2_vitg14": 1136.5,
    "dinov3_vits16": 21.6,
    "dinov3_vits16plus": 28.7,
    "dinov3_vitb16": 85.7,
    "dinov3_vitl16": 303.1,
    "dinov3_vith16plus": 840.6,
    "dinov3_vit7b16": 6716.0,
}


def abstract(spec: VitSpec, **options) -> DinoViT:
    return nnx.eval_shape(lambda: DinoViT(spec, rngs=nnx.Rngs(0), **options))


def small(spec: VitSpec, **options) -> DinoViT:
    """A module with random leaves drawn by numpy: initialising it would compile for longer than the test runs."""
    rng, module = np.random.default_rng(0), abstract(spec, **options)
    leaves = {
        path: ("scale" in path) + rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        for path, leaf in flat_parameters(module).items()
    }
    return with_parameters(module, leaves)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(graphdef, method: str, params, x):
    return getattr(nnx.merge(graphdef, params), method)(x)


def run(module: DinoViT, x: np.ndarray, method: str = "__call__"):
    """module.method(x), compiled once per architecture and size."""
    graphdef, params = nnx.split(module)
    return compiled(graphdef, method, params, x)


def images(grid: tuple[int, int], patch: int) -> np.ndarray:
    shape = (2, grid[0] * patch, grid[1] * patch, 3)
    return np.random.default_rng(1).random(shape, np.float32)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_has_its_published_parameter_count(name):
    count = sum(leaf.size for leaf in flat_parameters(abstract(variant(name))).values())
    base = name.removesuffix("_imgfocus").removesuffix("_reg")
    registers = 4 * variant(name).width if name.endswith("_reg") else 0
    assert (count - registers) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[base], abs=0.06)


def test_unknown_variant_error_lists_the_known_names():
    with pytest.raises(ValueError, match=r"'dinov2_vits16' is unknown; choose one of .*dinov2_vits14,"):
        variant("dinov2_vits16")


@pytest.mark.parametrize("name", ["dinov2_reg", "dinov3"])
def test_patches_come_out_in_row_major_order_without_prefix(name):
    spec = SPECS[name]
    module, prefix = small(spec), 1 + spec.registers
    x = images((3, 5), spec.patch)
    tokens, stages = run(module, x), run(module, x, "stages")
    assert tokens.shape == (2, 15, spec.width)
    np.testing.assert_array_equal(tokens, stages["normalised"][:, prefix:])
    # a change inside patch (row 1, column 3) moves only the embedding of token 1 * 5 + 3
    x[:, spec.patch + 2, 3 * spec.patch + 2] += 1
    moved = np.abs(run(module, x, "stages")["embeddings"] - stages["embeddings"]).max((0, 2)) > 0
    assert np.flatnonzero(moved).tolist() == [prefix + 8]


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_odd_sizes_equal_explicit_reflect_padding_right_and_bottom(name):
    module = small(SPECS[name])
    patch = module.spec.patch
    x = images((4, 5), patch)[:, : 3 * patch + 5, : 5 * patch - 1]
    padded = np.pad(x, ((0, 0), (0, patch - 5), (0, 1), (0, 0)), mode="reflect")
    assert module.spec.patch_grid(x.shape[1:3]) == (4, 5)
    np.testing.assert_array_equal(run(module, x), run(module, padded))


def test_rope_turns_pairs_in_float32_and_leaves_the_prefix():
    rotate = jax.jit(rope_rotation((2, 3), 16, prefix=5))
    x = jax.random.normal(jax.random.key(0), (1, 11, 2, 16), jnp.bfloat16)
    exact = rotate(x.astype(jnp.float32))
    # bf16 enters and leaves, the rotation between is float32: rounding the exact result gives the same bits
    np.testing.assert_array_equal(rotate(x), exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rotate(x)[:, :5], x[:, :5])
    norm = jnp.hypot(exact[..., :8], exact[..., 8:])
    np.testing.assert_allclose(norm, jnp.hypot(*jnp.split(x.astype(jnp.float32), 2, -1)), rtol=1e-5)


def test_rope_scores_depend_on_relative_position_only():
    rotate = rope_rotation((8, 8), 32, prefix=0)
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 32))
    turned = [rotate(jnp.tile(x, (1, 64, 1, 1)))[0, :, 0].reshape(8, 8, 32) for x in (query, key)]
    scores = jnp.einsum("ijd,kld->ijkl", *turned)
    # float32 over 32 products of order one
    assert scores[1, 2, 3, 5] == pytest.approx(float(scores[4, 1, 6, 4]), abs=1e-4)
    assert abs(scores[1, 2, 3, 5] - scores[1, 2, 3, 6]) > 1e-2


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_bfloat16_compute_keeps_float32_parameters_and_stays_close(name):
    spec = SPECS[name]
    module = small(spec, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in flat_parameters(module).values()} == {jnp.dtype(jnp.float32)}
    x = images((4, 4), spec.patch)
    tokens, exact = run(module, x), run(small(spec), x)
    assert tokens.dtype == jnp.bfloat16
    # 8 bits of mantissa (0.4 % per rounding) through a few residual blocks, on tokens of unit scale
    assert float(jnp.abs(tokens.astype(jnp.float32) - exact).mean()) < 0.02


@pytest.mark.torch
@pytest.mark.parametrize(("name", "grid"), PARITY)
def test_tokens_equal_transformers_at_every_stage(name, grid):
    from tests.models.transformers_vit import randomise, transformers_model, transformers_stages

    spec = SPECS[name]
    model = randomise(transformers_model(spec))
    source = {key: (lambda t=tensor: t.numpy()) for key, tensor in model.state_dict().items()}
    target = abstract(spec)
    table = choose_table(backbone_tables(spec), source, name)
    module = with_parameters(target, convert(source, table, flat_parameters(target), name))
    x = images(GRIDS[grid], spec.patch)
    theirs, ours = transformers_stages(model, x), run(module, x, "stages")
    for stage, expected in theirs.items():
        assert expected.std() > 0.3, f"{stage} is too small to compare"
        # float32 rounding: about 2e-5 on raw stages (values to 30), 5e-6 on normalised tokens
        np.testing.assert_allclose(ours[stage], expected, atol=1e-4, rtol=0, err_msg=stage)


@pytest.mark.torch
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(37, 8), (37, 50), (5, 5), (3, 8)])
def test_resize_matrix_is_torch_bicubic(size, antialias):
    import torch

    before, after = size
    square = torch.randn(1, 1, before, before, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        square, size=(after, after), mode="bicubic", align_corners=False, antialias=antialias
    )
    matrix = cubic_resize_matrix(before, after, antialias=antialias)
    # torch computes the sampling positions in float32, we in float64
    np.testing.assert_allclose(matrix @ square[0, 0].numpy() @ matrix.T, expected[0, 0], atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_has_the_leaves_of_the_published_architecture(name):
    import torch

    from tests.models.transformers_vit import transformers_model

    spec = variant(name)
    with torch.device("meta"):
        model = transformers_model(spec)
    ours = sum(leaf.size for leaf in flat_parameters(abstract(spec)).values())
    # the mask token is theirs alone: pretraining only
    assert ours == sum(p.numel() for key, p in model.named_parameters() if "mask_token" not in key)
