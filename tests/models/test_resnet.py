"""The policy's ResNet: torchvision's, with GroupNorm."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import policy as recipe
from rlawm_jax.models.lora import NO_LORA
from rlawm_jax.models.resnet import ResNet, group_norm
from tests.tiny_models import random_module, run

TORCHVISION_RESNET18 = 11_689_512 - 513_000  # its published count, without the classifier


def make(widths=(4, 8), blocks=(2, 1)):
    return lambda rngs: ResNet(widths=widths, blocks=blocks, low_rank=NO_LORA, dtype=np.float32, rngs=rngs)


def test_official_size_has_the_parameters_of_resnet18():
    settings = recipe.get_config().policy
    state = nnx.state(nnx.eval_shape(lambda: make(settings.widths, settings.blocks)(nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == TORCHVISION_RESNET18


@pytest.mark.parametrize(("width", "groups"), [(64, 4), (128, 8), (512, 32), (16, 1), (8, 1), (2, 1), (40, 2), (50, 1)])
def test_groups_hold_16_channels_or_more_and_never_a_single_one(width, groups):
    norm = group_norm(width, rngs=nnx.Rngs(0))
    assert norm.num_groups == groups and width // groups >= 2


@pytest.mark.parametrize("size", [64, 37])
def test_map_has_one_cell_per_stride_pixels_a_started_one_included(size):
    module = random_module(make())
    cells = -(-size // module.stride)
    assert run(module, np.zeros((1, size, size, 3), np.float32)).shape == (1, cells, cells, 8)


@pytest.mark.torch
@pytest.mark.parametrize("size", [32, 27])
def test_equals_torch_convolutions_group_norms_and_pooling(size):
    import torch
    from torch.nn import functional

    module = random_module(make((16, 32), (2, 2)), std=0.05)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)

    def conv(x, layer, stride):
        kernel = torch.tensor(np.asarray(layer.base.kernel[...])).permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, stride=stride, padding=(kernel.shape[-1] - 1) // 2)

    def norm(x, layer):
        scale, bias = (torch.tensor(np.asarray(p[...])) for p in (layer.scale, layer.bias))
        return functional.group_norm(x, x.shape[1] // 16, scale, bias, eps=1e-5)

    x = torch.tensor(images).permute(0, 3, 1, 2)
    x = functional.max_pool2d(functional.relu(norm(conv(x, module.stem, 2), module.stem_norm)), 3, stride=2, padding=1)
    for i, stage in enumerate(module.stages):
        for j, block in enumerate(stage):
            stride = 2 if i and not j else 1
            y = norm(
                conv(functional.relu(norm(conv(x, block.conv1, stride), block.norm1)), block.conv2, 1), block.norm2
            )
            shortcut = x if block.shortcut is None else norm(conv(x, block.shortcut, stride), block.shortcut_norm)
            x = functional.relu(y + shortcut)
    expected = x.permute(0, 2, 3, 1).numpy()
    # float32 sums in another order, through 9 convolutions
    np.testing.assert_allclose(run(module, images), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("widths", "blocks"), [((4, 8), (1,)), ((), ()), ((1, 8), (1, 1)), ((4, 8), (1, 0))])
def test_stages_that_do_not_exist_are_refused(widths, blocks):
    with pytest.raises(ValueError, match=r"config\.policy\.widths, blocks: expected"):
        nnx.eval_shape(lambda: make(widths, blocks)(nnx.Rngs(0)))
