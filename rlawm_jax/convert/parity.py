"""Does a converted network compute what its checkpoint does? Ours against PyTorch on the same weights, stage by stage.

The reference is the published layout in PyTorch (torch_reference.py), loaded with strict=True from the same files that
were converted. Inputs are unit normal on a small grid, which suffices because no weights are specific to a patch.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax import flow
from rlawm_jax.convert.release import fill, module_at
from rlawm_jax.models.vit import variant
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.weights.sources import open_source
from rlawm_jax.world_model import WorldModel

TORCH_INSTALL = "pip install torch==2.13.0"
GRID = 4  # patches per side
BATCH = 2
STEPS = 30
DTYPES = ("float32", "bfloat16")

Stages = dict[str, np.ndarray]


def parity(
    kind: str, files: Mapping[str, Path], converted: Mapping[str, Mapping[str, np.ndarray]], config: ConfigDict
) -> dict[str, dict[str, float]]:
    """Stage -> root mean square of PyTorch's output, and our largest absolute deviation in float32 and bfloat16.

    `converted` holds our parameters of the kind by module path. Empty, with an announcement, if torch is not
    installed or an RLA's input mode is not "sub".
    """
    if find_spec("torch") is None:
        announce(f"torch is not installed: no parity in the report ({TORCH_INSTALL})")
        return {}
    if kind == "rla" and config.rla.input_mode != "sub":
        announce(f"no parity in the report: expected config.rla.input_mode 'sub', found {config.rla.input_mode!r}")
        return {}
    announce(f"{kind}: comparing with PyTorch")
    inputs = _inputs(config)
    expected = dict(_theirs(kind, files, config, inputs))
    outputs = {dtype: _ours(kind, converted, config, dtype, inputs) for dtype in DTYPES}
    return {
        stage: {"rms": float(np.sqrt(np.mean(np.square(value))))}
        | {dtype: float(np.abs(outputs[dtype][stage] - value).max()) for dtype in DTYPES}
        for stage, value in expected.items()
    }


def _inputs(config: ConfigDict) -> dict[str, np.ndarray]:
    rng, width = np.random.default_rng(0), variant(config.backbone.name).width
    robots = sorted(config.denoiser.action_dims, key=int)
    rows = config.data.max_horizon

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return {
        "s0": draw(BATCH, GRID**2, width),
        "s1": draw(BATCH, GRID**2, width),
        "z": draw(BATCH, config.rla.num_tokens, config.rla.token_dim),
        "noise": draw(BATCH, config.rla.num_tokens, config.rla.token_dim),
        "actions": draw(BATCH, rows, max(config.denoiser.action_dims.values())),
        "counts": np.array([max(1, rows // 2), rows]),
        "robots": np.array([int(robots[0]), int(robots[-1])]),
        "times": np.array([0.2, 0.7], np.float32),
    }


def _theirs(
    kind: str, files: Mapping[str, Path], config: ConfigDict, inputs: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """PyTorch's outputs by stage."""
    import torch

    from rlawm_jax.convert import torch_reference as reference

    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    c, d, width = config.rla, config.denoiser, variant(config.backbone.name).width

    def loaded(name: str, make: Callable[[], Any]) -> Any:
        with torch.device("meta"):  # all parameters come from the file
            module = make()
        state = {key: torch.from_numpy(read()).float() for key, read in open_source(files[name]).items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval()

    with torch.no_grad():
        if kind == "rla":
            transformer = partial(reference.TokenTransformer, width)
            shape = (c.num_tokens, c.width, c.depth, c.heads, c.mlp_ratio)
            encoder = loaded("encoder", lambda: transformer(c.token_dim, *shape))
            yield "encoder", encoder(given["s1"] - given["s0"])[:, : c.num_tokens].numpy()
            decoder = loaded("decoder", lambda: transformer(width, *shape, latent_dim=c.token_dim))
            yield "decoder", decoder(given["s0"], given["z"])[:, c.num_tokens :].numpy()
        elif kind == "image_decoder":
            decoder = loaded("image_decoder", lambda: reference.ImageDecoder(width, config.image_decoder.width))
            frame, side = decoder(given["s0"], (GRID, GRID)), GRID * variant(config.backbone.name).patch
            if frame.shape[-1] != side:  # patches are not 16 pixels; the release has no such backbone
                frame = torch.nn.functional.interpolate(frame, (side, side), mode="bilinear")
            yield "frame", frame.permute(0, 2, 3, 1).numpy()
        else:
            dims = {int(robot): dim for robot, dim in d.action_dims.items()}
            sizes = (d.width, d.cond_depth, d.flow_depth, d.heads, d.mlp_ratio, config.data.max_horizon)
            model = loaded("flow_model", lambda: reference.FlowModel(width, c.token_dim, dims, *sizes))
            vec = model.action_vec(given["actions"], given["counts"], given["robots"])
            condition = model.condition(given["s0"], vec)
            yield "action vector", vec.numpy()
            keys = [_keys(block.cross_attn, condition) for block in model.flow_blocks]
            yield "condition (keys)", torch.stack(keys).numpy()
            yield "velocity", model.velocity(given["noise"], given["times"], condition).numpy()
            x = given["noise"]
            for i in range(STEPS):
                x = x - model.velocity(x, torch.full((BATCH,), 1 - i / STEPS), condition) / STEPS
            yield "30-step sample", x.numpy()


def _keys(attention: Any, condition: Any) -> Any:
    """Keys of a cross-attention, from its packed projection."""
    width = condition.shape[-1]
    weight, bias = (packed[width : 2 * width] for packed in (attention.in_proj_weight, attention.in_proj_bias))
    return condition @ weight.T + bias


def _ours(
    kind: str,
    converted: Mapping[str, Mapping[str, np.ndarray]],
    config: ConfigDict,
    dtype: str,
    inputs: Mapping[str, np.ndarray],
) -> Stages:
    """Our outputs by stage, with matmuls in `dtype`."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.dtype, config.backbone.image_size = dtype, GRID * variant(config.backbone.name).patch
    skeleton = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
    stages: Stages = {}
    for path, leaves in converted.items():
        module = _with_raw_rows(module_at(skeleton, path))
        fill(module, dict(leaves))
        graphdef, state = nnx.split(module)
        compute = jax.jit(partial(_stages, kind, path, graphdef))
        stages |= {name: np.asarray(value, np.float32) for name, value in compute(state, dict(inputs)).items()}
    return stages


def _with_raw_rows(module: nnx.Module) -> nnx.Module:
    """An abstract module whose action statistics, which no file holds, leave raw rows unchanged."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    flat = nnx.to_flat_state(rest)
    plain = [(path, leaf.replace(np.full(leaf.shape, path[-1] == "scale", np.float32))) for path, leaf in flat]
    return nnx.merge(graphdef, params, nnx.from_flat_state(plain))


def _stages(
    kind: str, path: str, graphdef: nnx.GraphDef, state: nnx.State, given: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    module: Any = nnx.merge(graphdef, state)
    if path == "rla.encoder":
        count = given["z"].shape[1]
        return {"encoder": module(given["s1"] - given["s0"])[:, :count]}
    if path == "rla.decoder":
        count = given["z"].shape[1]
        return {"decoder": module(given["s0"], given["z"])[:, count:]}
    if kind == "image_decoder":
        return {"frame": module(given["s0"])}
    vec = module.encode_actions(given["actions"], given["counts"], given["robots"])
    condition = module.condition(given["s0"], given["actions"], given["counts"], given["robots"])
    keys = condition.keys_values[0]
    sample = flow.sample(lambda x, t: module.velocity(x, t, condition), given["noise"], STEPS, "euler")
    return {
        "action vector": vec,
        "condition (keys)": keys.reshape(*keys.shape[:3], -1),
        "velocity": module.velocity(given["noise"], given["times"], condition),
        "30-step sample": sample,
    }
