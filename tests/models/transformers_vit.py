"""The reference implementation of both DINO families: transformers' models, with random weights."""

import numpy as np
import torch
import transformers as hf

from rlawm_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, VitSpec


def randomise(model, seed: int = 0):
    """Every parameter random, norms and LayerScales around one, so that no term of the forward pass can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around_one = name.endswith(("lambda1", "norm1.weight", "norm2.weight", "norm.weight"))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    return model.eval()


def transformers_model(spec: VitSpec):
    common = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "patch_size": spec.patch,
        "layer_norm_eps": spec.eps,
    }
    if spec.family == "dinov3":
        config = hf.DINOv3ViTConfig(
            **common,
            intermediate_size=spec.hidden,
            use_gated_mlp=spec.gated,
            hidden_act="silu" if spec.gated else "gelu",
            num_register_tokens=spec.registers,
            query_bias=spec.query_bias,
            key_bias=spec.key_bias,
            value_bias=spec.value_bias,
        )
        return hf.DINOv3ViTModel(config)
    common |= {"image_size": spec.position_grid * spec.patch, "use_swiglu_ffn": spec.gated, "mlp_ratio": 4}
    if spec.registers:
        return hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**common))
    return hf.Dinov2Model(hf.Dinov2Config(**common))


def transformers_stages(model, x: np.ndarray) -> dict[str, np.ndarray]:
    """All tokens after the modules that our stages name, caught by hooks."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    norm = model.norm if hasattr(model, "norm") else model.layernorm
    named = {"embeddings": model.embeddings, "first_block": layers[0], "last_block": layers[-1], "normalised": norm}
    caught = {}

    def catcher(name):
        def catch(module, inputs, output):
            caught[name] = (output[0] if isinstance(output, tuple) else output).numpy()

        return catch

    hooks = [module.register_forward_hook(catcher(name)) for name, module in named.items()]
    pixels = (x - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    with torch.no_grad():
        model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    for hook in hooks:
        hook.remove()
    return caught
