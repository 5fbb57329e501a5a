"""Behaviour-cloning policies of the release, both ways: ResNet, MLP, residual head, LoRA and normaliser.

Sizes are read from the tensors; normaliser.py keeps what our policy has no place for, so that converting back
reproduces every tensor bit for bit.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.convert.normaliser import NORMALIZER, limits_of, normaliser_of, read_normaliser, remember
from rlawm_jax.convert.release import CONV, fill
from rlawm_jax.convert.runs import (
    check_recipe,
    conversion_report,
    whole_folder,
    write_report,
    write_state_dict,
)
from rlawm_jax.models.policy import Policy
from rlawm_jax.policy.checkpoint import load_policy, save_policy
from rlawm_jax.run_folder.checkpoint import Checkpointer
from rlawm_jax.weights.rules import (
    TRANSPOSE,
    ConversionError,
    Rule,
    Source,
    Table,
    collected,
    convert,
    flat_parameters,
    linear,
    norm,
    revert,
)
from rlawm_jax.weights.sources import open_source, refuse_pointer
from rlawm_jax.weights.torch_files import TENSORS, OtherFormatError, read_torch_file

IMAGE_ENCODER = "img_encoder.backbones."
STATES = ("ema_model", "model")  # the averaged weights come first, since they are the ones that act
UNIFIED = ("learnable_tokens", "attn_blocks", "shared_mlp", "latent_head")


def bc_to_run(
    source: Path, output: Path, config: ConfigDict, *, step: int | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """Convert a checkpoint of the release to a policy's run folder `output`; returns its report.

    `source`: a .ckpt (a pickle: needs `allow_pickle`), or a .pt or .safetensors state_dict. `config` is a
    policy recipe; its sizes are replaced by those of the tensors. Raises ConversionError naming every tensor
    that does not fit.
    """
    with whole_folder(output) as folder:
        check_recipe(config, ("policy", "observed"), "configs/policy.py")
        tensors, camera = _plain_names(open_policy(source, allow_pickle=allow_pickle), source)
        config = _sized(config, tensors, source)
        skeleton = nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0)))
        weights = {name: read for name, read in tensors.items() if not name.startswith(NORMALIZER)}
        shapes = {path: leaf for path, leaf in flat_parameters(skeleton).items() if not path.startswith("critic.")}
        leaves, normaliser = {}, {}
        with collected() as problem:
            with problem():
                leaves = convert(weights, table(config), shapes, f"{source} as bc")
            with problem():
                normaliser = read_normaliser(tensors, config, source)
        limits = limits_of(normaliser, config)
        report = conversion_report("bc", step or 0, {"policy": leaves}) | {"from": [str(source)], "camera": camera}
        save_policy(folder, config, _filled(config, leaves, limits), step or 0)
        remember(normaliser, camera, folder)
        write_report(report, folder)
    return report


def bc_to_release(source: Path, output: Path, *, step: int | None = None) -> dict[str, Any]:
    """Write a folder `output` with the state_dict of one of our policies, under the release's names."""
    with whole_folder(output) as folder:
        policy, config = load_policy(source, step=step)
        if config.policy.rla.enabled:
            raise ValueError(f"{source}: expected a plain BC policy, found BC + RLA; its names are not known")
        _check_resize(config, source)
        number = _newest(source) if step is None else step
        leaves = {path: leaf for path, leaf in flat_parameters(policy).items() if not path.startswith("critic.")}
        unused = [path for path in table(config).optional if path in leaves]
        if not any(np.any(leaves[path]) for path in unused):
            leaves = {path: leaf for path, leaf in leaves.items() if path not in unused}
        normaliser, camera = normaliser_of(policy, source)
        tensors = {_release_name(n, leaves, camera): t for n, t in revert(leaves, table(config))} | normaliser
        write_state_dict(folder / f"policy_step{number:07d}", tensors)
        report = conversion_report("bc", number, {"policy": leaves}) | {"from": [str(source)]}
        write_report(report, folder)
    return report


def _check_resize(config: ConfigDict, source: Path) -> None:
    """Reject a policy to which the release would show other images than those it knows."""
    size, c = config.observed.image_size, config.policy
    if c.resize != "release" and size != c.image_size:
        raise ValueError(
            f"{source}: expected policy.resize=release, as the release resizes frames of {size} to {c.image_size} "
            f"pixels, found {c.resize}; train it with --config.policy.resize=release, or convert it to a run again"
        )


def _newest(run: Path) -> int:
    checkpoints = Checkpointer(run, read_only=True)
    try:
        return checkpoints.latest() or 0
    finally:
        checkpoints.close()


def _low_rank(source: str, target: str, rule: Any) -> list[Rule]:
    """PEFT's two low-rank factors of a layer."""
    return [Rule(f"{source}.lora_{x.upper()}.rl.weight", (f"{target}.lora.{x}.kernel",), rule) for x in "ab"]


def _layer(source: str, target: str) -> list[Rule]:
    return [*linear(source, f"{target}.base"), *_low_rank(source, target, TRANSPOSE)]


def _conv(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", (f"{target}.base.kernel",), CONV), *_low_rank(source, target, CONV)]


def table(config: ConfigDict) -> Table:
    """The names of a policy, without the camera and PEFT's wrappers."""
    c = config.policy
    rules = _conv("conv1", "encoder.stem") + norm("bn1", "encoder.stem_norm")
    for stage in range(len(c.widths)):
        theirs, ours = f"layer{stage + 1}.{{i}}", f"encoder.stages.{stage}.{{i}}"
        for n in (1, 2):
            rules += _conv(f"{theirs}.conv{n}", f"{ours}.conv{n}") + norm(f"{theirs}.bn{n}", f"{ours}.norm{n}")
        rules += _conv(f"{theirs}.downsample.0", f"{ours}.shortcut") + norm(
            f"{theirs}.downsample.1", f"{ours}.shortcut_norm"
        )
    rules = [rule._replace(source=IMAGE_ENCODER + rule.source) for rule in rules]
    rules += _stack("state_encoder.net", "state_encoder", 2, len(c.state_hidden))
    rules += _stack("decoder.net", "trunk", 3, len(c.hidden))
    rules += _layer(f"decoder.net.{3 * len(c.hidden)}", "action_head")
    rules += _stack("residual_net.backbone", "residual", 2, len(c.residual.hidden))
    rules += _layer("residual_net.head", "residual.head")
    paths = (f"state_encoder.hidden.{i}.lora.{x}.kernel" for i in range(len(c.state_hidden)) for x in "ab")
    return Table("release", tuple(rules), optional=dict.fromkeys(paths, "the release adapts no state encoder"))


def _stack(source: str, target: str, stride: int, depth: int) -> list[Rule]:
    """The linears of a torch Sequential, every `stride`-th of its modules."""
    return [rule for i in range(depth) for rule in _layer(f"{source}.{stride * i}", f"{target}.hidden.{i}")]


def open_policy(path: Path, *, allow_pickle: bool) -> Source:
    """The tensors of a policy checkpoint; a .ckpt of the release holds pickled objects and needs `allow_pickle`."""
    path = path.expanduser()
    if path.suffix != ".ckpt" or not path.exists():
        return open_source(path)
    refuse_pointer(path)
    if not allow_pickle:
        raise ConversionError(
            f"{path}: policy checkpoints of the release are pickles, which cannot be read weights-only; "
            "add --allow_pickle if you trust the file (its objects stay placeholders, only its tensors are read)"
        )
    expected = f"{path}: expected a policy checkpoint with state_dicts ({' or '.join(STATES)})"
    try:
        payload = read_torch_file(path, placeholders=True)
    except OtherFormatError as error:
        raise ConversionError(f"{expected}, found {error}") from None
    except ValueError as error:
        raise ConversionError(f"{expected}, found an incomplete file ({error}); fetch it again") from None
    states = payload.get("state_dicts") if isinstance(payload, dict) else None
    for name in STATES:
        if isinstance(states, dict) and isinstance(states.get(name), dict):
            return {key: value.read for key, value in states[name].items() if isinstance(value, TENSORS)}
    raise ConversionError(f"{expected}, found none; give a checkpoint as the release saves it")


def _plain_names(tensors: Source, source: Path) -> tuple[Source, str]:
    """The tensors under names without the camera and PEFT's wrappers, and the camera."""
    if unified := [name for name in tensors if name.split(".")[0] in UNIFIED]:
        raise ConversionError(
            f"{source}: expected a BC policy, found one of BC + RLA ({unified[0]}, ...), whose layout is not read here"
        )
    plain, cameras = {}, {}
    for name, read in tensors.items():
        short = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        if match := re.match(rf"{re.escape(IMAGE_ENCODER)}([^.]+)\.(.+)", short):
            cameras[match[1]] = None
            short = IMAGE_ENCODER + match[2]
        plain[short] = read
    if len(cameras) != 1:
        names = ", ".join(cameras) or "none"
        raise ConversionError(f"{source}: expected a policy ({IMAGE_ENCODER}CAMERA.*) with one camera, found {names}")
    return plain, next(iter(cameras))


def _release_name(name: str, leaves: Mapping[str, Any], camera: str) -> str:
    """The name that a strict load expects: with the camera, and with PEFT's wrapper on layers with low-rank factors."""
    wrapped = {path.split(".")[0] for path in leaves if ".lora." in path}
    adapted = [r"(^|\.)(conv\d|downsample\.0)\.weight$", r"^decoder\.net\.\d+\.(weight|bias)$"] if wrapped else []
    adapted += [r"^state_encoder\.net\.\d+\.(weight|bias)$"] if "state_encoder" in wrapped else []
    if any(re.search(pattern, name) for pattern in adapted):
        head, _, leaf = name.rpartition(".")
        name = f"{head}.base_layer.{leaf}"
    return name.replace(IMAGE_ENCODER, f"{IMAGE_ENCODER}{camera}.", 1)


def _sized(config: ConfigDict, tensors: Source, source: Path) -> ConfigDict:
    """The recipe with its sizes taken from the tensors."""
    config = config.copy_and_resolve_references()
    problems = []

    def size(name: str, axis: int = 0) -> int:
        try:
            shape = tensors[name]().shape if name in tensors else None
        except ConversionError as error:
            problems.append(f"{name}: {error}")
            return 1
        if shape is not None and len(shape) > axis and shape[axis]:
            return shape[axis]
        actual = "none" if shape is None else f"shape {shape}"
        problems.append(f"{name}: expected {axis + 1} or more axes to read a size from, found {actual}")
        return 1

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})

    stages = numbers(rf"{re.escape(IMAGE_ENCODER)}layer(\d+)\.")
    decoder = numbers(r"decoder\.net\.(\d+)\.")
    actions = size(f"{NORMALIZER}action.scale")
    outputs = size(f"decoder.net.{decoder[-1] if decoder else 9}.weight")
    if not stages:
        problems.append(f"{IMAGE_ENCODER}CAMERA.layer1: expected the stages of a ResNet, found none")
    if not problems and outputs % actions:
        problems.append(f"decoder.net.{decoder[-1]}: expected chunks of {actions} actions, found {outputs} outputs")
    residual = "residual_net.head.weight" in tensors
    factors = [name for name in tensors if name.endswith(".lora_A.rl.weight")]
    with config.unlocked():
        c = config.policy
        c.widths = tuple(size(f"{IMAGE_ENCODER}layer{i}.0.conv1.weight") for i in stages)
        c.blocks = tuple(len(numbers(rf"{re.escape(IMAGE_ENCODER)}layer{i}\.(\d+)\.")) for i in stages)
        c.hidden = tuple(size(f"decoder.net.{i}.weight") for i in decoder[:-1])
        c.update({"action_dim": actions, "horizon": outputs // actions})
        c.rla.enabled = False
        c.resize = "release"
        state = numbers(r"state_encoder\.net\.(\d+)\.")
        c.state_dim = size("state_encoder.net.0.weight", 1) if state else 0
        if state:
            c.state_hidden = tuple(size(f"state_encoder.net.{i}.weight") for i in state)
        c.residual.update({"enabled": residual or bool(factors), "lora_rank": size(factors[0]) if factors else 0})
        if residual:
            c.executed = size("residual_net.head.weight") // (2 * actions)
            layers = numbers(r"residual_net\.backbone\.(\d+)\.")
            c.residual.hidden = tuple(size(f"residual_net.backbone.{i}.weight") for i in layers)
        config.observed.image_size = config.observed.image_size or 512
    if problems:
        lines = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
        raise ConversionError(f"{source}: expected a BC policy of the release:\n{lines}")
    return config.lock()


def _filled(config: ConfigDict, leaves: dict[str, np.ndarray], limits: Mapping[str, np.ndarray]) -> Policy:
    """The policy with its weights; a critic, which the release stores elsewhere, is newly initialised."""
    policy = Policy(config, rngs=nnx.Rngs(0))
    if policy.critic is not None:
        leaves |= {f"critic.{path}": np.asarray(leaf) for path, leaf in flat_parameters(policy.critic).items()}
    fill(policy, leaves)
    for name, value in limits.items():
        getattr(policy, name).set_value(jnp.asarray(value))
    return policy
