"""Modules with random weights everywhere, drawn by numpy: initialisers would compile for longer than the tests run."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from rlawm_jax.latent_scale import initial_scale
from rlawm_jax.models.layers import Statistic
from rlawm_jax.models.vit import DinoViT, variant
from rlawm_jax.world_model import WorldModel

# 28 px and patch 14: 2x2 tokens, 384 wide
BACKBONE = "dinov2_vits14"
TOKENS, TOKEN_WIDTH, IMAGE_SIZE = 4, 384, 28
LATENT = (3, 4)
# a mean and deviation for each of the latent's numbers
PER_DIMENSION = {
    "latent_scale__running": True,
    "latent_scale__per_dimension": True,
    "denoiser__token_embedding": True,
}


def random_module(make: Callable[[nnx.Rngs], nnx.Module], seed: int = 0, std: float = 0.15) -> nnx.Module:
    """make(rngs) with every parameter N(0, std), norm scales around 1; statistics keep the values of the constructor.

    Nothing is zero, so that no branch hides behind a zero-initialised layer.
    """
    rng, filled = np.random.default_rng(seed), []
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    for path, leaf in nnx.to_flat_state(state):
        if isinstance(leaf, Statistic):
            value = np.zeros(leaf.shape) if path[-1] == "offset" else np.ones(leaf.shape)
        else:
            value = (path[-1] == "scale") + rng.normal(0, std, leaf.shape)
        filled.append((path, leaf.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def initialised(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """make(rngs) as its own initialisers leave it, compiled in one piece."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(make(nnx.Rngs(0))))())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(graphdef, method, state, args):
    return getattr(nnx.merge(graphdef, state), method)(*args)


def run(module: nnx.Module, *args, method: str = "__call__"):
    """module.method(*args), compiled once per architecture, method and shapes."""
    graphdef, state = nnx.split(module)
    return _compiled(graphdef, method, state, args)


def exact_products(module: nnx.Module, *args, method: str = "__call__") -> tuple[int, int]:
    """(products whose factors no accelerator rounds, all others) in the lowered program of module.method(*args)."""
    graphdef, state = nnx.split(module)
    program = jax.jit(lambda state, *args: getattr(nnx.merge(graphdef, state), method)(*args)).lower(state, *args)
    products = [line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line]
    exact = sum("precision = [HIGHEST, HIGHEST]" in line for line in products)
    return exact, len(products) - exact


def paths_with_gradient(grads: nnx.State) -> set[str]:
    """Dotted paths of the leaves whose gradient is not zero everywhere."""
    flat = nnx.to_flat_state(grads)
    return {".".join(map(str, path)) for path, leaf in flat if np.any(np.asarray(leaf.get_value()))}


def tiny_config(**overrides) -> ConfigDict:
    """configs/base.py with networks of width 16; overrides by dotted name, as on the command line."""
    config = base.get_config()
    config.dtype = "float32"
    config.backbone.update({"name": BACKBONE, "image_size": IMAGE_SIZE})
    config.rla.update({"num_tokens": LATENT[0], "token_dim": LATENT[1], "width": 16, "depth": 1, "heads": 2})
    config.denoiser.update({"width": 16, "cond_depth": 1, "flow_depth": 1, "heads": 2})
    config.denoiser.action_dims = {"0": 2, "2": 3}
    config.image_decoder.width = 16
    config.data.max_horizon = 5
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config.lock()


def tiny_world(backbone: bool = False, seed: int = 0, **overrides) -> WorldModel:
    """A world model of `tiny_config` with random weights; its backbone, if any, has one block."""
    config = tiny_config(**overrides)

    def make(rngs: nnx.Rngs) -> WorldModel:
        vit = DinoViT(replace(variant(BACKBONE), depth=1, position_grid=2), rngs=rngs) if backbone else None
        return WorldModel(config, backbone=vit, rngs=rngs)

    model = random_module(make, seed)
    model.latent_scale[...] = initial_scale(config)
    return model


def tokens(batch: int, seed: int = 0) -> np.ndarray:
    """Unit-scale tokens [batch, 4, 384]."""
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, TOKEN_WIDTH)).astype(np.float32)
