"""Image similarity in pure JAX: SSIM, PSNR, LPIPS, one number per image. Images are [n, h, w, 3] in [0, 1]."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2

# accelerators would round the factors of float32 products, and small distances with them
EXACT = jax.lax.Precision.HIGHEST

# torchvision VGG-16: indices of the convolutions in `features`, per stage; 2x2 max pools between the stages
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_WIDTHS = (64, 128, 256, 512, 512)
# the normalisation LPIPS applies to images in [-1, 1]
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


def psnr(a: Float[Array, "n h w 3"], b: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
    """Peak signal-to-noise ratio in dB, capped at 100: one pair of equal images would make a mean infinite."""
    error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean(axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(a: Float[Array, "n h w 3"], b: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
    """Structural similarity, 1 for equal images (11x11 Gaussian, sigma 1.5, zero padding; METHOD.md 13.7)."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # five filterings in one product
    mean_a, mean_b, square_a, square_b, product = jnp.split(
        _blur(jnp.concatenate([a, b, a * a, b * b, a * b], axis=-1)), 5, axis=-1
    )
    # differences of nearly equal numbers: rounding in `_blur` would show here
    variance = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance + SSIM_C2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _blur(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    # two banded matrices: on a CPU a depthwise convolution and its gradient take about 20 times as long
    rows, columns = _blur_matrix(x.shape[1]), _blur_matrix(x.shape[2])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x, precision=EXACT)


def _blur_matrix(size: int) -> np.ndarray:
    """The 1-D Gaussian filter with zero padding as a [size, size] matrix."""
    reach = SSIM_WINDOW // 2
    offset = np.subtract.outer(np.arange(size), np.arange(size))
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * SSIM_SIGMA**2))
    inside = np.where(np.abs(offset) <= reach, np.exp(-(offset**2) / (2 * SSIM_SIGMA**2)), 0.0)
    return (inside / taps.sum()).astype(np.float32)


class Lpips(NamedTuple):
    """LPIPS 0.1 with VGG-16 features (Zhang et al. 2018): weights as a pytree; call it on two image batches."""

    kernels: tuple[tuple[Float[Array, "3 3 i o"], ...], ...]
    biases: tuple[tuple[Float[Array, " o"], ...], ...]
    heads: tuple[Float[Array, " c"], ...]

    def __call__(self, a: Float[Array, "n h w 3"], b: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
        """Perceptual distance, 0 for equal images; sides must be 16 pixels or more."""
        distance = jnp.zeros(a.shape[0])
        pairs = zip(self.features(a), self.features(b), self.heads, strict=True)
        for features_a, features_b, head in pairs:
            difference = jnp.square(_unit(features_a) - _unit(features_b))
            distance += jnp.matmul(difference, head, precision=EXACT).mean(axis=(1, 2))
        return distance

    def features(self, images: Float[Array, "n h w 3"]) -> list[Float[Array, "n h w c"]]:
        """VGG activations after the last ReLU of each of the five stages."""
        x = (2.0 * images.astype(jnp.float32) - 1.0 - jnp.asarray(LPIPS_SHIFT)) / jnp.asarray(LPIPS_SCALE)
        stages = []
        for i, (kernels, biases) in enumerate(zip(self.kernels, self.biases, strict=True)):
            if i:
                # starts from -inf, the identity of max: with any other initial value it has no gradient
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for kernel, bias in zip(kernels, biases, strict=True):
                x = jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=EXACT
                )
                x = jax.nn.relu(x + bias)
            stages.append(x)
        return stages


def _unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    # where all ReLUs are off, the square root's gradient would be NaN: the tiny constant keeps it finite
    return x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-30) + 1e-10)


def load_lpips(path: str | Path) -> Lpips:
    """LPIPS from one .safetensors file: torchvision's VGG-16 and the linear heads under their own names.

    Names: `features.{i}.weight|bias` for VGG-16's convolutions (torch layout) and `lin{k}.model.1.weight` [1, c, 1, 1].
    Raises a one-line FileNotFoundError or ValueError if the file, a name or a shape is not as expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"LPIPS weights: expected a .safetensors file {path}, found none; leave lpips_weights empty to go without"
        )
    arrays = _read(path, lpips_shapes())
    return Lpips(
        kernels=tuple(tuple(arrays[f"features.{i}.weight"].transpose(2, 3, 1, 0) for i in s) for s in VGG_STAGES),
        biases=tuple(tuple(arrays[f"features.{i}.bias"] for i in s) for s in VGG_STAGES),
        heads=tuple(arrays[f"lin{k}.model.1.weight"].reshape(-1) for k in range(len(VGG_WIDTHS))),
    )


def lpips_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LPIPS tensors, in torch's layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    in_width = 3
    for stage, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
        for i in stage:
            shapes |= {f"features.{i}.weight": (width, in_width, 3, 3), f"features.{i}.bias": (width,)}
            in_width = width
    return shapes | {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(VGG_WIDTHS)}


def _read(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    try:
        with safe_open(str(path), framework="numpy") as file:
            missing = sorted(set(expected) - set(file.keys()))
            if missing:
                raise ValueError(
                    f"LPIPS weights {path}: expected {missing[0]} and {len(expected) - 1} more names, found no "
                    f"{', '.join(missing[:4])}; make the file with python -m launch.convert --kind=lpips"
                )
            arrays = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in expected}
    except SafetensorError as error:
        raise ValueError(
            f"LPIPS weights {path}: expected a .safetensors file, found {error}; export it again"
        ) from None
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"LPIPS weights {path}: {name}: expected shape {shape}, found {arrays[name].shape}; is this VGG-16?"
            )
    return arrays
