"""The convolution shared by image decoder and policies: values and gradients of XLA's, with none of its slow cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlawm_jax.models.convolution import convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")


def draw(size: tuple[int, int], kernel: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (3, *size, 4), (kernel, kernel, 4, 5)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def ours(x, kernel, stride=1):
    pad = (kernel.shape[0] - 1) // 2
    return convolve(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=LAYOUT)


def xla(x, kernel, stride=1):
    pad = (kernel.shape[0] - 1) // 2
    pads = ((pad, pad), (pad, pad))
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=LAYOUT)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "kernel"), [((1, 1), 3), ((2, 2), 3), ((1, 5), 3), ((4, 2), 3)])
def test_maps_smaller_than_the_kernel_are_convolved_like_any_other(size, kernel, stride):
    arguments = draw(size, kernel)
    np.testing.assert_allclose(ours(*arguments, stride), xla(*arguments, stride), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [((6, 5), 3, 1), ((7, 8), 3, 2), ((9, 9), 7, 2), ((4, 4), 1, 2), ((2, 2), 3, 2)]
)
def test_gradients_are_those_of_xlas_convolution(size, kernel, stride):
    x, weights = draw(size, kernel)

    def gradients(convolution):
        return jax.grad(lambda x, k: jnp.sin(convolution(x, k, stride)).sum(), argnums=(0, 1))(x, weights)

    for mine, theirs in zip(gradients(ours), gradients(xla), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_cpu_program_has_no_convolution_whose_window_is_the_map():
    """Which XLA runs without a library inside loops."""
    x, weights = draw((32, 32), 3)

    def windows(convolution, platform):
        gradient = jax.jit(jax.grad(lambda k: convolution(x, k).sum()))
        text = gradient.trace(weights).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution")

    assert windows(xla, "cpu") == 1  # the forward pass is not needed for the gradient of a sum
    assert windows(ours, "cpu") == 0
    assert windows(ours, "cuda") == windows(xla, "cuda")


def test_the_gradient_can_be_taken_under_vmap_and_rematerialised():
    x, weights = draw((5, 5), 3)
    two = np.stack([weights, 2 * weights])
    gradient = jax.grad(lambda k: jnp.square(jax.checkpoint(ours)(x, k)).sum())
    together = jax.vmap(gradient)(two)
    for each, alone in zip(together, two, strict=True):
        np.testing.assert_allclose(each, gradient(alone), rtol=1e-4, atol=1e-3)
