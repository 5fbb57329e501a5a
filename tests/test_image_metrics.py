"""SSIM and PSNR against definitions written out in numpy, LPIPS against the same network built from torch layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlawm_jax.image_metrics import LPIPS_SCALE, LPIPS_SHIFT, VGG_STAGES, VGG_WIDTHS, Lpips, load_lpips, psnr, ssim


def images(seed, n=2, h=18, w=15):
    rng = np.random.default_rng(seed)
    return rng.random((n, h, w, 3)).astype(np.float32)


def slow_ssim(a, b):
    """The definition, pixel by pixel, in float64."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    a, b = (np.pad(x.astype(np.float64), ((5, 5), (5, 5), (0, 0))) for x in (a, b))
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            for c in range(3):
                p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
                mp, mq = (kernel * p).sum(), (kernel * q).sum()
                vp, vq = (kernel * p * p).sum() - mp**2, (kernel * q * q).sum() - mq**2
                cov = (kernel * p * q).sum() - mp * mq
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(values)


def test_ssim_is_its_definition_with_zero_padding():
    a, b = images(0), images(1)
    b[1] = 0.7 * a[1] + 0.1
    expected = [slow_ssim(a[i], b[i]) for i in range(2)]
    np.testing.assert_allclose(jax.jit(ssim)(a, b), expected, atol=2e-5)  # float32 against float64


def test_ssim_is_one_for_equal_images_and_symmetric():
    a, b = images(0), images(1)
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-6)
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), atol=1e-6)


def test_ssim_gradient_is_the_slope():
    a, b = images(0, n=1), images(1, n=1)
    direction = images(2, n=1) - 0.5
    grad = jax.grad(lambda x: ssim(x, b).sum())(a)
    step = 1e-2
    slope = (ssim(a + step * direction, b) - ssim(a - step * direction, b)) / (2 * step)
    np.testing.assert_allclose((grad * direction).sum(), slope[0], rtol=2e-2)  # central differences in float32


def test_psnr_is_minus_ten_log_of_the_mean_square_error_and_at_most_100():
    a = np.full((2, 4, 4, 3), 0.5, np.float32)
    b = a + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), [20.0, 40.0], atol=1e-3)
    np.testing.assert_allclose(psnr(a, a), 100.0, rtol=1e-5)


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    arrays, in_width = {}, 3
    for stage, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
        for i in stage:
            scale = np.sqrt(2 / (9 * in_width))
            arrays[f"features.{i}.weight"] = (rng.standard_normal((width, in_width, 3, 3)) * scale).astype(np.float32)
            arrays[f"features.{i}.bias"] = (rng.standard_normal(width) * 0.1).astype(np.float32)
            in_width = width
    for k, width in enumerate(VGG_WIDTHS):
        arrays[f"lin{k}.model.1.weight"] = rng.random((1, width, 1, 1)).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def test_lpips_is_zero_on_equal_images_and_positive_otherwise(weights_file):
    lpips = load_lpips(weights_file)
    a, b = images(0, h=34, w=32), images(1, h=34, w=32)
    np.testing.assert_array_equal(lpips(a, a), [0.0, 0.0])
    assert lpips(a, b).shape == (2,) and (lpips(a, b) > 0).all()


def test_lpips_gradient_is_finite_where_all_features_are_off(weights_file):
    lpips = load_lpips(weights_file)
    narrow = Lpips(
        kernels=jax.tree.map(lambda x: x[:, :, :4, :4], lpips.kernels),
        biases=jax.tree.map(lambda x: x[:4] - 1e3, lpips.biases),
        heads=jax.tree.map(lambda x: x[:4], lpips.heads),
    )
    a, b = jnp.asarray(images(0, n=1, h=16, w=16)), images(1, n=1, h=16, w=16)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: narrow(x, b).sum()))(a)).all()


def test_no_accelerator_rounds_the_factors_of_lpips(weights_file):
    a = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    program = jax.jit(load_lpips(weights_file).__call__).lower(a, a).as_text().splitlines()
    for kind, count in (("convolution(", 13 * 2), ("dot_general", 5)):
        found = [line for line in program if f"stablehlo.{kind}" in line]
        assert len(found) == sum("HIGHEST" in line for line in found) == count


def test_bad_lpips_files_give_one_line_that_names_the_fault(weights, weights_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors.*leave lpips_weights empty"):
        load_lpips(tmp_path / "none.safetensors")
    short = {k: v for k, v in weights.items() if k != "lin3.model.1.weight"}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"short\.safetensors.*lin3\.model\.1\.weight"):
        load_lpips(tmp_path / "short.safetensors")
    save_file({**weights, "features.2.bias": np.zeros(3, np.float32)}, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"features\.2\.bias: expected shape \(64,\), found \(3,\)"):
        load_lpips(tmp_path / "shape.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors: expected a \.safetensors file"):
        load_lpips(tmp_path / "cut.safetensors")


@pytest.mark.torch
def test_lpips_equals_the_same_network_in_torch_layers(weights, weights_file):
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def features(x):
        x = (x * 2 - 1 - torch.tensor(LPIPS_SHIFT).view(1, 3, 1, 1)) / torch.tensor(LPIPS_SCALE).view(1, 3, 1, 1)
        for i, stage in enumerate(VGG_STAGES):
            x = nn.functional.max_pool2d(x, 2) if i else x
            for j in stage:
                weight, bias = (torch.tensor(weights[f"features.{j}.{part}"]) for part in ("weight", "bias"))
                x = nn.functional.relu(nn.functional.conv2d(x, weight, bias, padding=1))
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    a, b = images(0, h=35, w=32), images(1, h=35, w=32)
    expected = sum(
        nn.functional.conv2d((fa - fb) ** 2, torch.tensor(weights[f"lin{k}.model.1.weight"])).mean(dim=(1, 2, 3))
        for k, (fa, fb) in enumerate(zip(*(features(torch.tensor(x).permute(0, 3, 1, 2)) for x in (a, b)), strict=True))
    )
    # 13 convolutions in float32, sums in another order
    np.testing.assert_allclose(load_lpips(weights_file)(a, b), expected.numpy(), rtol=1e-4)
