"""LPIPS weights: from the published files, however they are split, to the one file that metrics and losses read."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlawm_jax.convert.lpips import FILE, to_lpips
from rlawm_jax.image_metrics import load_lpips, lpips_shapes
from rlawm_jax.weights.rules import ConversionError


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in lpips_shapes().items()}


def split(tensors):
    """(torchvision's file, the heads' file)."""
    vgg = {name: value for name, value in tensors.items() if name.startswith("features.")}
    return vgg | {"classifier.0.weight": np.zeros(3, np.float32)}, {k: v for k, v in tensors.items() if k not in vgg}


def save(folder, **files):
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in files]


def test_vgg_and_heads_become_one_file_bit_for_bit(tensors, tmp_path):
    vgg, heads = split(tensors)
    report = to_lpips(save(tmp_path, vgg=vgg, heads=heads), tmp_path / "out")
    saved = load_file(tmp_path / "out" / FILE)
    assert saved.keys() == tensors.keys() and all(np.array_equal(saved[name], tensors[name]) for name in tensors)
    assert report["networks"]["lpips"]["parameters"] == 14_714_688 + 1_472  # VGG-16's convolutions, and the heads
    assert len(load_lpips(tmp_path / "out" / FILE).heads) == 5


def test_the_state_dict_of_the_lpips_package_is_read_too(tensors, tmp_path):
    package = {"scaling_layer.shift": np.zeros(3, np.float32)}
    for name, value in tensors.items():
        if name.startswith("features."):
            package[name.replace("features.", "net.slice2.")] = value
        else:
            package |= {name: value, f"lins.{name[3]}.model.1.weight": value}
    to_lpips(save(tmp_path, both=package), tmp_path / "out")
    saved = load_file(tmp_path / "out" / FILE)
    assert all(np.array_equal(saved[name], tensors[name]) for name in tensors)


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_left(tensors, tmp_path):
    vgg, heads = split(tensors)
    vgg |= {"features.0.bias": np.full(64, np.nan, np.float32), "features.2.weight": np.zeros((1, 2), np.float32)}
    del heads["lin3.model.1.weight"]
    with pytest.raises(ConversionError) as error:
        to_lpips(save(tmp_path, vgg=vgg, heads=heads), tmp_path / "out")
    for line in (
        "features.0.bias: holds NaN",
        "features.2.weight: expected shape (64, 64, 3, 3)",
        "lin3.model.1.weight: missing",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_files_is_refused(tensors, tmp_path):
    vgg, heads = split(tensors)
    with pytest.raises(ConversionError, match=r"b\.safetensors: \S+: expected once, found in another file"):
        to_lpips(save(tmp_path, a=vgg, b=vgg, c=heads), tmp_path / "out")
