"""The release's networks at their official sizes, random, in PyTorch."""

import torch

from rlawm_jax.convert.torch_reference import FlowModel, ImageDecoder, TokenTransformer, randomise

WIDTH, BLOCKS, HEADS, LATENT = 1024, 12, 16, (32, 64)
STD = WIDTH**-0.5


def network(name: str) -> torch.nn.Module:
    """A random network of the release, float32; linears keep the scale of their inputs, so that outputs are of 1."""
    count, width = LATENT
    transformer = (count, WIDTH, BLOCKS, HEADS, 4.0)
    make = {
        "encoder": lambda: TokenTransformer(WIDTH, width, *transformer),
        "decoder": lambda: TokenTransformer(WIDTH, WIDTH, *transformer, latent_dim=width),
        "flow_model": lambda: FlowModel(WIDTH, width, {0: 9}, WIDTH, 8, 8, HEADS, 4.0),
        "image_decoder": lambda: ImageDecoder(WIDTH, 1024),
    }[name]
    with torch.device("meta"):  # torch's own initialisers would only take time
        module = make()
    randomise(module.to_empty(device="cpu"), seed=len(name), std=STD)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_((WIDTH / parameter.shape[1]) ** 0.5)
    return module
