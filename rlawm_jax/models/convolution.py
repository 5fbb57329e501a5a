"""Convolution whose time on a CPU does not depend on where in a program it stands; elsewhere XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], strides, padding, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated` of undilated NHWC maps, for `nnx.Conv(conv_general_dilated=...)`.

    XLA's CPU backend has no library for two cases, which are matrix products here: maps smaller than the kernel
    (policies at 64 pixels end in such maps), and the kernel's gradient inside a loop or a conditional, whose window is
    the whole map (PPO's minibatches are a loop). Both take several times as long otherwise.
    """
    small = x.shape[1] < kernel.shape[0] or x.shape[2] < kernel.shape[1]

    def plain(x: Array, kernel: Array) -> Array:
        if small:
            windows = _windows(x, kernel.shape, strides, padding)
            return jnp.einsum("bhwki,kio->bhwo", windows, kernel.reshape(-1, *kernel.shape[2:]))
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def kernel_gradient(x: Array, kernel: Array, change: Array) -> Array:
        return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](change)[0]

    def product_of_windows(x: Array, kernel: Array, change: Array) -> Array:
        windows = _windows(x, kernel.shape, strides, padding)
        columns = windows.reshape(-1, windows.shape[-2] * windows.shape[-1])
        return (columns.T @ change.reshape(-1, change.shape[-1])).reshape(kernel.shape)

    @jax.custom_vjp
    def convolved(x: Array, kernel: Array) -> Array:
        return plain(x, kernel)

    def backward(saved: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
        x, kernel = saved
        (towards_x,) = jax.vjp(lambda x: plain(x, kernel), x)[1](change)
        return towards_x, jax.lax.platform_dependent(x, kernel, change, cpu=product_of_windows, default=kernel_gradient)

    convolved.defvjp(lambda x, kernel: (plain(x, kernel), (x, kernel)), backward)
    return convolved(x, kernel)


def _windows(x: Array, kernel: tuple[int, ...], strides, padding) -> Float[Array, "b g v n i"]:
    """The n = k * k inputs under the kernel at every place of the result."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [n - size + 1 for n, size in zip(x.shape[1:3], kernel, strict=False)]
    return jnp.stack(
        [
            x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(kernel[0])
            for j in range(kernel[1])
        ],
        axis=3,
    )
