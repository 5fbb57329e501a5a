"""What a released checkpoint implies for its config: sizes that its tensors show, and settings that are fixed."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rlawm_jax.models.vit import variant
from rlawm_jax.weights.rules import ConversionError, Source

GROUPS = 8  # in every GroupNorm of the release's image decoder, at any width

ROBOT_LINEAR = "qpos_encoders.{robot}.per_frame_mlp.0.weight"

# fields whose values do not show in the weights
UNREADABLE = {
    "rla": ("rla.heads", "rla.input_mode", "rla.decoder_only"),
    "denoiser": ("denoiser.heads", "data.max_horizon"),
    "image_decoder": (),
}
# fixed in the release's networks; with another value the same weights would compute something else
FIXED = {
    "rla": {"rla.decoder_output": "absolute"},
    "denoiser": {"denoiser.token_embedding": False, "denoiser.action_in_flow": False},
    "image_decoder": {"image_decoder.stages": 4},
}
# field, network, tensor, axis
SIZES = {
    "rla": (
        ("rla.num_tokens", "encoder", "tokens", 0),
        ("rla.width", "encoder", "tokens", 1),
        ("rla.token_dim", "decoder", "token_proj.weight", 1),
        ("backbone.name", "decoder", "out_layer.weight", 0),
    ),
    "denoiser": (
        ("denoiser.width", "flow_model", "flow_latent_proj.weight", 0),
        ("rla.token_dim", "flow_model", "flow_latent_proj.weight", 1),
        ("backbone.name", "flow_model", "xt_proj.weight", 1),
    ),
    "image_decoder": (
        ("image_decoder.width", "image_decoder", "input_proj.0.weight", 0),
        ("backbone.name", "image_decoder", "input_proj.0.weight", 1),
    ),
}
# field of the depth, field of the MLP ratio, network, name of its blocks
BLOCKS = {
    "rla": (("rla.depth", "rla.mlp_ratio", "encoder", "blocks"),),
    "denoiser": (
        ("denoiser.cond_depth", "denoiser.mlp_ratio", "flow_model", "cond_blocks"),
        ("denoiser.flow_depth", "denoiser.mlp_ratio", "flow_model", "flow_blocks"),
    ),
    "image_decoder": (),
}


def check_fixed(kind: str, config: ConfigDict) -> None:
    """Raise ValueError naming all settings under which the release's weights would mean something else."""
    problems = [
        f"config.{field}: expected {value!r}, as the release's {kind}, found {lookup(config, field)!r}"
        for field, value in FIXED[kind].items()
        if lookup(config, field) != value
    ]
    # the width is halved four times
    if kind == "image_decoder" and config.image_decoder.width % (16 * GROUPS):
        problems.append(
            f"config.image_decoder.width: expected a multiple of {16 * GROUPS} ({GROUPS} groups in the last stage), as "
            f"the release's, found {config.image_decoder.width}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def lookup(config: ConfigDict, field: str) -> Any:
    """The value of a dotted field."""
    for name in field.split("."):
        config = config[name]
    return config


def misfits(kind: str, sources: Mapping[str, Source], config: ConfigDict) -> Iterator[str]:
    """One line per setting that contradicts the tensors. Absent tensors are not reported here."""
    for field, expected, evidence in shown_sizes(kind, sources):
        if field == "backbone.name":
            name = config.backbone.name
            if variant(name).width != expected:
                width = variant(name).width
                yield f"config.{field}: expected one of width {expected} ({evidence}), found {name} of width {width}"
        elif (value := _plain(lookup(config, field))) != expected:
            yield f"config.{field}: expected {expected} ({evidence}), found {value}"


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def shown_sizes(kind: str, sources: Mapping[str, Source]) -> Iterator[tuple[str, Any, str]]:
    """(field, value, evidence) of every setting that a kind's tensors show.

    `backbone.name` stands for its width.
    """
    for field, network, tensor, axis in SIZES[kind]:
        shape = shape_of(sources[network], tensor)
        if axis < len(shape):
            yield field, shape[axis], f"{tensor} is {list(shape)}"
    for depth, ratio, network, blocks in BLOCKS[kind]:
        source = sources[network]
        layers = [int(match[1]) for name in source if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
        if layers:
            yield depth, max(layers) + 1, f"the last block is {blocks}.{max(layers)}"
        hidden = f"{blocks}.0.mlp.0.weight"
        if len(shape := shape_of(source, hidden)) == 2 and shape[1]:
            yield ratio, shape[0] / shape[1], f"{hidden} is {list(shape)}"
    if kind == "denoiser":
        yield "denoiser.action_dims", _robot_widths(sources["flow_model"]), f"from {ROBOT_LINEAR}"


def _robot_widths(source: Source) -> dict[str, int]:
    """Width of the action rows by robot id."""
    pattern = re.escape(ROBOT_LINEAR).replace(re.escape("{robot}"), r"([^.]+)")
    shapes = ((match[1], shape_of(source, name)) for name in source if (match := re.fullmatch(pattern, name)))
    return {robot: shape[-1] for robot, shape in shapes if shape}


def shape_of(source: Source, name: str) -> tuple[int, ...]:
    """A tensor's shape; empty for one that is absent or unreadable, which its conversion will report."""
    try:
        return source[name]().shape if name in source else ()
    except ConversionError:
        return ()
