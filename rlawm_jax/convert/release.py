"""The networks of the PyTorch release as conversion tables: RLA encoder and decoder, flow model, image decoder.

A *kind* is a part of our world model that the release trains in one run; it consists of one file per *network*. The
tables convert every parameter in both directions. Settings that the weights do not show (heads, input mode) come from
the config; those that they show are compared with it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.convert.release_config import check_fixed, misfits
from rlawm_jax.latent_scale import is_per_dimension
from rlawm_jax.weights.rules import (
    TRANSPOSE,
    ConversionError,
    Rule,
    Source,
    Table,
    Transform,
    collected,
    convert,
    flat_parameters,
    linear,
    norm,
    revert,
    split,
)
from rlawm_jax.weights.sources import open_source
from rlawm_jax.world_model import WorldModel

LATENT_SCALE = 10.0  # a constant of the release
SUFFIXES = (".safetensors", ".pt")
LAYER = "[{i}]"

# torch convolutions are [out, in, rows, columns], ours [rows, columns, in, out]
CONV = Transform(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: x.transpose(3, 2, 0, 1))
# torch transposed convolutions are [in, out, rows, columns], ours [in, rows, columns, out]
CONV_TRANSPOSE = Transform(lambda x: (x.transpose(0, 2, 3, 1),), lambda x: x.transpose(0, 3, 1, 2))


def _attention(source: str, target: str) -> list[Rule]:
    """Torch's MultiheadAttention: query, key and value packed into one linear, in this order."""
    parts = [f"{target}.{name}" for name in ("query", "key", "value")]
    return [
        Rule(f"{source}.in_proj_weight", tuple(f"{p}.kernel{LAYER}" for p in parts), split(3, transpose=True)),
        Rule(f"{source}.in_proj_bias", tuple(f"{p}.bias{LAYER}" for p in parts), split(3)),
        *linear(f"{source}.out_proj", f"{target}.out", LAYER),
    ]


def _mlp(source: str, target: str, index: str = "") -> list[Rule]:
    """The two linears of a torch Sequential whose middle is an activation."""
    return [*linear(f"{source}.0", f"{target}.up", index), *linear(f"{source}.2", f"{target}.down", index)]


def _token_transformer() -> Table:
    block = "blocks.blocks"
    return Table(
        "release",
        (
            Rule("tokens", ("tokens",)),
            *linear("token_proj", "token_proj"),
            *linear("input_layer", "input_layer"),
            *_attention("blocks.{i}.attn", f"{block}.attn"),
            *_mlp("blocks.{i}.mlp", f"{block}.mlp", LAYER),
            *norm("norm_out", "norm_out"),
            *linear("out_layer", "out_layer"),
        ),
    )


def _flow_model() -> Table:
    theirs, ours = "qpos_encoders.{robot}", "action_encoders.{robot}"
    cond, flow = "cond_blocks.blocks", "flow_blocks.blocks"
    return Table(
        "release",
        (
            *_mlp(f"{theirs}.per_frame_mlp", ours),
            Rule(f"{theirs}.gru.weight_ih_l0", (f"{ours}.gru.input_kernel",), TRANSPOSE),
            Rule(f"{theirs}.gru.weight_hh_l0", (f"{ours}.gru.hidden_kernel",), TRANSPOSE),
            Rule(f"{theirs}.gru.bias_ih_l0", (f"{ours}.gru.input_bias",)),
            Rule(f"{theirs}.gru.bias_hh_l0", (f"{ours}.gru.hidden_bias",)),
            *linear("xt_proj", "token_in"),
            *_attention("cond_blocks.{i}.attn", f"{cond}.attn"),
            *_mlp("cond_blocks.{i}.mlp", f"{cond}.mlp", LAYER),
            *linear("cond_blocks.{i}.cond_proj", f"{cond}.cond_proj", LAYER),
            *linear("cond_blocks.{i}.modulation.1", f"{cond}.modulation.linear", LAYER),
            *linear("flow_latent_proj", "latent_in"),
            *_mlp("flow_time_embedder.mlp", "time_embedding"),
            *norm("flow_blocks.{i}.norm2", f"{flow}.cross_norm", LAYER),
            *_attention("flow_blocks.{i}.self_attn", f"{flow}.self_attn"),
            *_attention("flow_blocks.{i}.cross_attn", f"{flow}.cross_attn"),
            *_mlp("flow_blocks.{i}.mlp", f"{flow}.mlp", LAYER),
            *linear("flow_blocks.{i}.modulation.1", f"{flow}.modulation.linear", LAYER),
            *norm("flow_norm_out", "norm_out"),
            *linear("flow_out_proj", "out_layer"),
        ),
    )


def _conv(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", (f"{target}.kernel",), CONV), Rule(f"{source}.bias", (f"{target}.bias",))]


def _residual_block(source: str, target: str) -> list[Rule]:
    rules = []
    for n in (1, 2):
        rules += _conv(f"{source}.conv{n}", f"{target}.conv{n}") + norm(f"{source}.norm{n}", f"{target}.norm{n}")
    return rules


def _image_decoder() -> Table:
    rules = _conv("input_proj.0", "conv_in") + norm("input_proj.1", "norm_in")
    rules += _residual_block("input_proj.3", "blocks_in.0") + _residual_block("input_proj.4", "blocks_in.1")
    for i in range(4):
        rules.append(Rule(f"up{i + 1}.upsample.weight", (f"ups.{i}.kernel",), CONV_TRANSPOSE))
        rules.append(Rule(f"up{i + 1}.upsample.bias", (f"ups.{i}.bias",)))
        rules += _residual_block(f"up{i + 1}.resblock.{{j}}", f"up_blocks.{i}.{{j}}")
    rules += _residual_block("out_conv.0", "block_out") + _conv("out_conv.1", "conv_out")
    return Table("release", tuple(rules))


class Network(NamedTuple):
    """One file of the release: its name and an alternative one, our module's path, and the table between them."""

    name: str
    alias: str
    path: str
    table: Table


KINDS = {
    "rla": (
        Network("encoder", "encoder", "rla.encoder", _token_transformer()),
        Network("decoder", "decoder", "rla.decoder", _token_transformer()),
    ),
    "denoiser": (Network("flow_model", "flow_model", "denoiser", _flow_model()),),
    # the release's image-decoder runs call their model decoder
    "image_decoder": (Network("image_decoder", "decoder", "image_decoder", _image_decoder()),),
}


def find_files(kind: str, source: Path, step: int | None) -> tuple[dict[str, Path], int]:
    """The files of a kind by network, and their step: `step`, or the highest one that all networks have.

    `source`: a run folder of the release, its ckpts/, or a single file if the kind has one network. Raises
    FileNotFoundError naming what was expected and what was found.
    """
    networks = KINDS[kind]
    if source.is_file() and len(networks) == 1:
        number = re.search(r"_step(\d+)", source.name)
        return {networks[0].name: source}, int(number[1]) if number else 0
    folder = source / "ckpts" if (source / "ckpts").is_dir() else source
    if not folder.is_dir():
        files = " and ".join(f"{network.name}_step*.pt" for network in networks)
        raise FileNotFoundError(f"--source: expected a folder with {files}, found none at {source}")
    by_network = {network.name: find_steps(folder, network) for network in networks}
    common = set.intersection(*(set(files) for files in by_network.values()))
    if not common or step not in {None, *common}:
        names = " and ".join(f"{network.name}_step{'*' if step is None else f'{step:07d}'}.pt" for network in networks)
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder}: expected {names} of the same step, found {there}")
    step = max(common) if step is None else step
    return {name: files[step] for name, files in by_network.items()}, step


def find_steps(folder: Path, network: Network) -> dict[int, Path]:
    """A network's files by step, in a run folder or its ckpts/.

    Its name takes precedence over its alias, and .safetensors over .pt.
    """
    folder = folder / "ckpts" if (folder / "ckpts").is_dir() else folder
    steps: dict[int, Path] = {}
    for name in (network.name, network.alias):
        for suffix in SUFFIXES:
            for file in folder.glob(f"{name}_step*{suffix}"):
                if number := re.fullmatch(r"\d+", file.stem.removeprefix(f"{name}_step")):
                    steps.setdefault(int(number[0]), file)
    return steps


def read_kind(kind: str, files: Mapping[str, Path], config: ConfigDict) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters of every network of a kind: module path -> leaf path -> array.

    Raises ConversionError, once for all files, naming every setting and every tensor that does not fit.
    """
    check_fixed(kind, config)
    sources = open_files(kind, files)
    model = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
    converted = {}
    with collected() as problem:
        with problem():
            _check_sizes(kind, sources, config, files)
        for network in KINDS[kind]:
            label = f"{files[network.name]} as {network.name}"
            shapes = flat_parameters(module_at(model, network.path))
            with problem():
                converted[network.path] = convert(sources[network.name], network.table, shapes, label)
    return converted


def _check_sizes(kind: str, sources: Mapping[str, Source], config: ConfigDict, files: Mapping[str, Path]) -> None:
    if problems := list(misfits(kind, sources, config)):
        lines = "\n".join(f"  {line}" for line in problems)
        raise ConversionError(f"{', '.join(map(str, files.values()))}: the config describes other sizes:\n{lines}")


def open_files(kind: str, files: Mapping[str, Path]) -> dict[str, Source]:
    """The tensors of a kind's files by network; ConversionError naming every file that is not of that kind."""
    sources = {}
    with collected() as problem:
        for name, file in files.items():
            with problem():
                sources[name] = open_source(file)
                _check_kind(kind, sources[name], str(file))
    return sources


def _check_kind(kind: str, source: Source, label: str) -> None:
    """Raise ConversionError for a file of another kind, naming that kind, or of no known kind."""
    score = {other: sum(map(networks[0].table.recognises, source)) for other, networks in KINDS.items()}
    best = max(score, key=score.__getitem__)
    if not score[best]:
        names = ", ".join(list(source)[:5]) or "none at all"
        raise ConversionError(f"{label}: expected the tensors of a {kind} of the release, found {names}")
    if score[best] > score[kind]:
        raise ConversionError(f"{label}: expected a checkpoint of kind {kind}, found one of kind {best}; --kind={best}")


def module_at(model: nnx.Module, path: str) -> nnx.Module:
    """The submodule at a dotted path."""
    for name in path.split("."):
        model = getattr(model, name)
    return model


def fill(module: nnx.Module, leaves: dict[str, np.ndarray]) -> None:
    """Set the module's parameters to `leaves`; the dict is emptied so that nothing is in memory twice."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    filled = [(path, leaf.replace(jax.device_put(leaves.pop(".".join(map(str, path)))))) for path, leaf in flat]
    nnx.update(module, nnx.from_flat_state(filled))


def state_dicts(kind: str, model: WorldModel, config: ConfigDict) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(network, state_dict under the release's names) of a kind, one network in memory at a time.

    Action statistics are folded into the first linear of each action encoder, because the release reads raw rows.
    Raises ValueError for a model that the release's networks cannot hold.
    """
    check_fixed(kind, config)
    scale = model.latent_scale[...]
    if kind != "image_decoder" and (is_per_dimension(scale) or scale != LATENT_SCALE):
        stored = "a mean and deviation per dimension" if is_per_dimension(scale) else f"{scale:.4g}"
        raise ValueError(
            f"latent scale: expected the release's constant {LATENT_SCALE}, found {stored}; "
            "train with config.latent_scale.value=10 and config.latent_scale.running=False to export a model"
        )
    for network in KINDS[kind]:
        leaves = flat_parameters(module_at(model, network.path))
        if kind == "denoiser":
            _fold_action_statistics(model, leaves)
        yield network.name, dict(revert(leaves, network.table))


def _fold_action_statistics(model: WorldModel, leaves: dict[str, Any]) -> None:
    for robot, encoder in model.denoiser.action_encoders.items():
        scale, offset = np.asarray(encoder.scale[...]), np.asarray(encoder.offset[...])
        if np.all(scale == 1) and not np.any(offset):
            continue
        kernel, bias = (f"action_encoders.{robot}.up.{leaf}" for leaf in ("kernel", "bias"))
        weight = np.asarray(leaves[kernel])
        leaves[kernel], leaves[bias] = scale[:, None] * weight, np.asarray(leaves[bias]) + offset @ weight
