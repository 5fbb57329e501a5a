"""Hand-written copies of torch_reference weights into our modules: nested dicts named as ours, filled from state_dicts.

Deliberately separate from rlawm_jax/convert: parity tests must not trust the converter that they check.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.tiny_models import random_module

State = Mapping[str, "torch.Tensor"]


def part(state: State, prefix: str) -> dict:
    """The entries of a state_dict below `prefix`, without it."""
    return {name.removeprefix(prefix + "."): value for name, value in state.items() if name.startswith(prefix + ".")}


def load(make: Callable[[nnx.Rngs], nnx.Module], weights: dict) -> nnx.Module:
    """make(rngs) holding `weights`; every parameter must be named, with its own shape, and nothing else may be."""
    graphdef, params, rest = nnx.split(random_module(make), nnx.Param, ...)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
    given = {}
    for path, value in jax.tree_util.tree_leaves_with_path(weights):
        given[".".join(str(key.key) for key in path)] = np.asarray(value, np.float32)
    assert given.keys() == flat.keys(), given.keys() ^ flat.keys()
    assert all(given[name].shape == leaf.shape for name, leaf in flat.items())
    filled = nnx.map_state(lambda path, leaf: leaf.replace(jnp.asarray(given[".".join(map(str, path))])), params)
    return nnx.merge(graphdef, filled, rest)


def linear(state: State) -> dict:
    out = {"kernel": state["weight"].numpy().T}
    return out | ({"bias": state["bias"].numpy()} if "bias" in state else {})


def norm(state: State) -> dict:
    return {"scale": state["weight"].numpy(), "bias": state["bias"].numpy()}


def attention(state: State) -> dict:
    packed = zip(state["in_proj_weight"].chunk(3), state["in_proj_bias"].chunk(3), strict=True)
    query, key, value = (linear({"weight": weight, "bias": bias}) for weight, bias in packed)
    return {"query": query, "key": key, "value": value, "out": linear(part(state, "out_proj"))}


def mlp(state: State) -> dict:
    return {"up": linear(part(state, "0")), "down": linear(part(state, "2"))}


def gru(state: State) -> dict:
    return {
        "input_kernel": state["weight_ih_l0"].numpy().T,
        "hidden_kernel": state["weight_hh_l0"].numpy().T,
        "input_bias": state["bias_ih_l0"].numpy(),
        "hidden_bias": state["bias_hh_l0"].numpy(),
    }


def block(state: State) -> dict:
    return {"attn": attention(part(state, "attn")), "mlp": mlp(part(state, "mlp"))}


def condition_block(state: State) -> dict:
    return block(state) | {
        "cond_proj": linear(part(state, "cond_proj")),
        "modulation": {"linear": linear(part(state, "modulation.1"))},
    }


def flow_block(state: State) -> dict:
    return {
        "self_attn": attention(part(state, "self_attn")),
        "cross_norm": norm(part(state, "norm2")),
        "cross_attn": attention(part(state, "cross_attn")),
        "mlp": mlp(part(state, "mlp")),
        "modulation": {"linear": linear(part(state, "modulation.1"))},
    }


def stacked(state: State, convert) -> dict:
    """Blocks 0, 1, ... of a ModuleList on one leading layer axis."""
    depth = 1 + max(int(name.split(".")[0]) for name in state)
    layers = [convert(part(state, str(i))) for i in range(depth)]
    return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def token_transformer(state: State) -> dict:
    out = {
        "tokens": state["tokens"].numpy(),
        "input_layer": linear(part(state, "input_layer")),
        "blocks": stacked(part(state, "blocks"), block),
        "norm_out": norm(part(state, "norm_out")),
        "out_layer": linear(part(state, "out_layer")),
    }
    return out | ({"token_proj": linear(part(state, "token_proj"))} if "token_proj.weight" in state else {})


def action_encoder(state: State) -> dict:
    return mlp(part(state, "per_frame_mlp")) | {"gru": gru(part(state, "gru"))}


def denoiser(state: State) -> dict:
    robots = {name.split(".")[1] for name in state if name.startswith("qpos_encoders.")}
    out = {
        "action_encoders": {robot: action_encoder(part(state, f"qpos_encoders.{robot}")) for robot in robots},
        "cond_blocks": stacked(part(state, "cond_blocks"), condition_block),
        "latent_in": linear(part(state, "flow_latent_proj")),
        "time_embedding": mlp(part(state, "flow_time_embedder.mlp")),
        "flow_blocks": stacked(part(state, "flow_blocks"), flow_block),
        "norm_out": norm(part(state, "flow_norm_out")),
        "out_layer": linear(part(state, "flow_out_proj")),
    }
    return out | ({"token_in": linear(part(state, "xt_proj"))} if "xt_proj.weight" in state else {})


def conv(state: State) -> dict:
    return {"kernel": state["weight"].numpy().transpose(2, 3, 1, 0), "bias": state["bias"].numpy()}


def residual_block(state: State) -> dict:
    convs = {name: conv(part(state, name)) for name in ("conv1", "conv2")}
    return convs | {name: norm(part(state, name)) for name in ("norm1", "norm2")}


def image_decoder(state: State) -> dict:
    ups = [part(state, f"up{i}") for i in range(1, 5)]
    return {
        "conv_in": conv(part(state, "input_proj.0")),
        "norm_in": norm(part(state, "input_proj.1")),
        "blocks_in": {i: residual_block(part(state, f"input_proj.{3 + i}")) for i in range(2)},
        "ups": {
            i: {
                "kernel": up["upsample.weight"].numpy().transpose(0, 2, 3, 1),
                "bias": up["upsample.bias"].numpy(),
            }
            for i, up in enumerate(ups)
        },
        "up_blocks": {i: {j: residual_block(part(up, f"resblock.{j}")) for j in range(2)} for i, up in enumerate(ups)},
        "block_out": residual_block(part(state, "out_conv.0")),
        "conv_out": conv(part(state, "out_conv.1")),
    }
