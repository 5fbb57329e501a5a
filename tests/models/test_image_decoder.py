"""The image decoder: what it maps to what, its start, its blocks by hand, and PyTorch parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.models.image_decoder import ImageDecoder, ResidualBlock, Upsample
from tests import numpy_reference as reference
from tests.tiny_models import random_module, run

F32 = jnp.float32


def make(grid=(2, 3), patch=16, width=16, token_width=6, dtype=F32, remat="none", **more):
    return lambda rngs: ImageDecoder(
        token_width=token_width, grid=grid, patch=patch, width=width, remat=remat, dtype=dtype, rngs=rngs, **more
    )


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TOKENS = draw(2, 6, 6)


def test_picture_has_patch_pixels_per_token_and_lays_tokens_out_row_by_row():
    module = random_module(make())
    # without the off-centre taps only the norms' statistics tie patches together, and those do not see their order
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda leaf: leaf * centre if leaf.shape[:2] == (3, 3) else leaf, state)
    module, order = nnx.merge(graphdef, state), np.asarray([4, 0, 5, 2, 1, 3])

    def squares(tokens):
        image = np.asarray(run(module, tokens))
        assert image.shape == (2, 32, 48, 3)
        return image.reshape(2, 2, 16, 3, 16, 3).swapaxes(2, 3).reshape(2, 6, 16, 16, 3)

    plain = squares(TOKENS)
    # statistics summed in another order, through 26 layers
    np.testing.assert_allclose(squares(TOKENS[:, order]), plain[:, order], rtol=0, atol=1e-4)
    assert np.abs(plain[:, order] - plain).max() > 1e-2


def test_the_last_convolution_starts_at_zero_or_with_columns_that_tell_colours_apart():
    def kernel(gain):
        make_one = lambda: ImageDecoder(  # noqa: E731
            token_width=6, grid=(1, 1), patch=16, width=128, output_gain=gain, dtype=F32, rngs=nnx.Rngs(0)
        )
        return np.asarray(jax.jit(lambda: make_one().conv_out.kernel[...])()).reshape(-1, 3)

    assert not kernel(0.0).any()
    found = kernel(0.3)
    bound = 0.3 * np.sqrt(6 / 72)  # He-uniform over 3 x 3 x 8 inputs
    assert 0.9 * bound < np.abs(found).max() <= bound
    strengths = np.linalg.svd(found, compute_uv=False)
    assert strengths[2] > strengths[0] / 2


def test_rematerialisation_saves_memory_and_changes_no_gradient():
    saved, grads = [], []
    for remat in ("none", "full"):
        graphdef, state = nnx.split(random_module(make(remat=remat)))
        paint = lambda state, graphdef=graphdef: nnx.merge(graphdef, state)(TOKENS)  # noqa: E731
        residuals = jax.eval_shape(lambda s, paint=paint: jax.vjp(paint, s)[1], state)
        saved.append(sum(leaf.size for leaf in jax.tree.leaves(residuals)))
        grads.append(jax.jit(jax.grad(lambda s, paint=paint: jnp.square(paint(s)).sum()))(state))
    assert saved[1] < saved[0] / 3
    again, plain = map(jax.tree.leaves, grads)
    # biases in front of a norm have gradients of rounding noise alone
    noise = 1e-5 * max(np.abs(leaf).max() for leaf in plain)
    for ours, theirs in zip(again, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=noise)


def test_other_patch_sizes_resize_the_same_picture_bilinearly():
    sixteen, fourteen = random_module(make()), random_module(make(patch=14))
    small = run(fourteen, TOKENS)
    assert small.shape == (2, 28, 42, 3)
    # bilinear without antialiasing, by its formula: output pixel i lies at (i + 1/2) * 8/7 - 1/2
    big = np.asarray(run(sixteen, TOKENS), np.float64)
    for place, size in ((1, 32), (2, 48)):
        at = (np.arange(size * 7 // 8) + 0.5) * 8 / 7 - 0.5
        low = np.floor(at).astype(int)
        share = np.expand_dims(at - low, tuple(d for d in range(4) if d != place))
        big = np.take(big, low, place) * (1 - share) + np.take(big, np.minimum(low + 1, size - 1), place) * share
    np.testing.assert_allclose(small, big, rtol=0, atol=1e-5)


def test_fewer_stages_paint_fewer_pixels_and_resize_them():
    coarse = random_module(make(stages=2))
    image = np.asarray(run(coarse, TOKENS))
    assert image.shape == (2, 32, 48, 3)
    # four painted pixels a patch: what lies between is linear in them
    assert np.abs(np.diff(image[:, 2:-2], n=2, axis=1)).reshape(2, -1, 48, 3)[:, 0::4].max() < 1e-5
    assert np.abs(np.diff(image, axis=1)).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 0}, r"config\.image_decoder\.stages: expected 1 or more, found 0"),
        ({"width": 24}, r"config\.image_decoder\.width: expected a multiple of 16, found 24"),
        ({"width": 20, "stages": 3}, r"config\.image_decoder\.width: expected a multiple of 8, found 20"),
    ],
)
def test_sizes_that_no_decoder_has_name_their_key(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)(nnx.Rngs(0))


def test_fresh_picture_is_zero_for_any_tokens():
    module = random_module(make())
    assert np.any(run(module, TOKENS))
    nnx.update(module.conv_out, jax.jit(lambda: nnx.state(make()(nnx.Rngs(0)).conv_out))())
    assert not np.any(run(module, TOKENS))


def test_upsample_turns_each_pixel_into_its_own_square():
    module = random_module(lambda rngs: Upsample(3, 2, dtype=F32, rngs=rngs))
    x = draw(1, 2, 2, 3)
    y = np.asarray(run(module, x))
    for row, column, p, q in np.ndindex(2, 2, 2, 2):
        expected = x[0, row, column] @ reference.leaf(module, "kernel")[:, p, q] + reference.leaf(module, "bias")
        np.testing.assert_allclose(y[0, 2 * row + p, 2 * column + q], expected, rtol=0, atol=1e-6)


def test_residual_block_is_conv_norm_gelu_conv_norm_add_gelu():
    module = random_module(lambda rngs: ResidualBlock(16, dtype=F32, rngs=rngs), std=0.4)
    x = draw(1, 1, 1, 16)

    def conv_norm(i: int, y: np.ndarray) -> np.ndarray:
        # on one pixel a padded 3x3 convolution is its centre tap, and a group is two channels
        y = y @ reference.leaf(module, f"conv{i}.kernel")[1, 1] + reference.leaf(module, f"conv{i}.bias")
        grouped = reference.standardised(y.reshape(8, 2)).reshape(16)
        return grouped * reference.leaf(module, f"norm{i}.scale") + reference.leaf(module, f"norm{i}.bias")

    expected = reference.gelu(x[0, 0, 0] + conv_norm(2, reference.gelu(conv_norm(1, x[0, 0, 0]))))
    np.testing.assert_allclose(run(module, x)[0, 0, 0], expected, rtol=0, atol=1e-5)


def test_bfloat16_compute_stays_close_to_float32_and_pictures_are_float32():
    exact, rough = run(random_module(make()), TOKENS), run(random_module(make(dtype=jnp.bfloat16)), TOKENS)
    assert rough.dtype == jnp.float32
    # 26 layers in a row, each rounded to 8 bits (0.4 %), adding up at worst
    assert 0 < np.sqrt(np.square(exact - rough).mean()) / exact.std() < 0.1


def test_token_counts_and_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected 2x3=6 tokens, found 4"):
        nnx.eval_shape(lambda: make()(nnx.Rngs(0))(jnp.zeros((1, 4, 6))))
    with pytest.raises(ValueError, match=r"config\.image_decoder\.width: expected a multiple of 16, found 24"):
        make(width=24)(nnx.Rngs(0))


@pytest.mark.torch
def test_image_decoder_equals_pytorch():
    torch = pytest.importorskip("torch")
    from rlawm_jax.convert import torch_reference
    from tests import torch_weights

    theirs = torch_reference.randomise(torch_reference.ImageDecoder(6, 128), std=0.05)
    ours = torch_weights.load(make(width=128), torch_weights.image_decoder(theirs.state_dict()))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS), (2, 3)).permute(0, 2, 3, 1)
        shrunk = torch.nn.functional.interpolate(
            expected.permute(0, 3, 1, 2), (28, 42), mode="bilinear", align_corners=False, antialias=False
        ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(run(ours, TOKENS), expected, rtol=0, atol=1e-4)
    ours.patch = 14
    np.testing.assert_allclose(run(ours, TOKENS), shrunk, rtol=0, atol=1e-4)
