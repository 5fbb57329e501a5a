"""Behaviour-cloning policies of the release, both ways: ResNet, MLP, residual head, LoRA and normaliser.

Sizes are read off the tensors. Statistics that a normaliser only remembers (min, max, mean, std of the data) have no
place in our policy; they travel beside the checkpoint, so that the way back gives every tensor bit for bit.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax.acting import load_policy, save_policy
from rlawm_jax.checkpoint import Checkpointer
from rlawm_jax.convert.release import CONV, fill
from rlawm_jax.convert.rules import (
    TRANSPOSE,
    ConversionError,
    Rule,
    Source,
    Table,
    convert,
    flat_parameters,
    linear,
    norm,
    revert,
)
from rlawm_jax.convert.runs import conversion_report, whole_folder, write_report, write_state_dict
from rlawm_jax.convert.sources import open_policy
from rlawm_jax.logging import say
from rlawm_jax.models.policy import Policy

CAMERA = "front_lower_camera"
REMEMBERED = "normalizer.safetensors"
EYES = "img_encoder.backbones."
NORMALIZER = "normalizer.params_dict."
STATISTICS = ("min", "max", "mean", "std")
IMAGE = {"scale": 2.0, "offset": -1.0}  # [0, 1] to [-1, 1], which our policy does itself
UNIFIED = ("learnable_tokens", "attn_blocks", "shared_mlp", "latent_head")


def bc_to_run(
    source: Path, output: Path, config: ConfigDict, *, step: int | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """A policy's run folder `output` from a checkpoint of the release; returns its report.

    `source`: a .ckpt (a pickle: needs `allow_pickle`), or a .pt or .safetensors state_dict. `config` is a
    policy recipe; its sizes are replaced by the tensors'. Raises ConversionError naming every tensor that does not fit.
    """
    with whole_folder(output) as folder:
        tensors, camera = _plain_names(open_policy(source, allow_pickle=allow_pickle), source)
        config = _sized(config, tensors, source)
        skeleton = nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0)))
        normaliser = {name: read() for name, read in tensors.items() if name.startswith(NORMALIZER)}
        weights = {name: read for name, read in tensors.items() if name not in normaliser}
        shapes = {path: leaf for path, leaf in flat_parameters(skeleton).items() if not path.startswith("critic.")}
        leaves = convert(weights, table(config), shapes, f"{source} as bc")
        limits = _limits(normaliser, config, source)
        report = conversion_report("bc", step or 0, {"policy": leaves}) | {"from": [str(source)], "camera": camera}
        save_policy(folder, config, _filled(config, leaves, limits), step or 0)
        _remember(normaliser, camera, folder)
        write_report(report, folder)
    return report


def bc_to_release(source: Path, output: Path, *, step: int | None = None) -> dict[str, Any]:
    """A folder `output` with the state_dict of a policy of ours, under the release's names."""
    with whole_folder(output) as folder:
        policy, config = load_policy(source, step=step)
        if config.policy.rla.enabled:
            raise ValueError(f"{source}: expected a plain BC policy, found BC + RLA; its names are not known")
        number = _newest(source) if step is None else step
        leaves = {path: leaf for path, leaf in flat_parameters(policy).items() if not path.startswith("critic.")}
        normaliser, camera = _normaliser(policy, source)
        tensors = {_release_name(n, leaves, camera): t for n, t in revert(leaves, table(config))} | normaliser
        write_state_dict(folder / f"policy_step{number:07d}", tensors)
        report = conversion_report("bc", number, {"policy": leaves}) | {"from": [str(source)]}
        write_report(report, folder)
    return report


def _newest(run: Path) -> int:
    checkpoints = Checkpointer(run, read_only=True)
    try:
        return checkpoints.latest() or 0
    finally:
        checkpoints.close()


def _low_rank(source: str, target: str, rule: Any) -> list[Rule]:
    """PEFT's two factors of a layer."""
    return [Rule(f"{source}.lora_{x.upper()}.rl.weight", (f"{target}.lora.{x}.kernel",), rule) for x in "ab"]


def _layer(source: str, target: str) -> list[Rule]:
    return [*linear(source, f"{target}.base"), *_low_rank(source, target, TRANSPOSE)]


def _conv(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", (f"{target}.base.kernel",), CONV), *_low_rank(source, target, CONV)]


def table(config: ConfigDict) -> Table:
    """The names of a policy, camera and PEFT's wrappers taken out."""
    c = config.policy
    rules = _conv("conv1", "encoder.stem") + norm("bn1", "encoder.stem_norm")
    for stage in range(len(c.widths)):
        theirs, ours = f"layer{stage + 1}.{{i}}", f"encoder.stages.{stage}.{{i}}"
        for n in (1, 2):
            rules += _conv(f"{theirs}.conv{n}", f"{ours}.conv{n}") + norm(f"{theirs}.bn{n}", f"{ours}.norm{n}")
        rules += _conv(f"{theirs}.downsample.0", f"{ours}.shortcut") + norm(
            f"{theirs}.downsample.1", f"{ours}.shortcut_norm"
        )
    rules = [rule._replace(source=EYES + rule.source) for rule in rules]
    rules += _stack("state_encoder.net", "state_encoder", 2, len(c.state_hidden))
    rules += _stack("decoder.net", "trunk", 3, len(c.hidden))
    rules += _layer(f"decoder.net.{3 * len(c.hidden)}", "action_head")
    rules += _stack("residual_net.backbone", "residual", 2, len(c.residual.hidden))
    rules += _layer("residual_net.head", "residual.head")
    return Table("release", tuple(rules))


def _stack(source: str, target: str, stride: int, depth: int) -> list[Rule]:
    """The linears of a torch Sequential, every `stride`-th of its modules."""
    return [rule for i in range(depth) for rule in _layer(f"{source}.{stride * i}", f"{target}.hidden.{i}")]


def _plain_names(tensors: Source, source: Path) -> tuple[Source, str]:
    """Tensors without camera and PEFT's wrappers in their names, and the camera."""
    if found := [name for name in tensors if name.split(".")[0] in UNIFIED]:
        raise ConversionError(
            f"{source}: expected a BC policy, found one of BC + RLA ({found[0]}, ...), whose layout is not read here"
        )
    plain, cameras = {}, {}
    for name, read in tensors.items():
        short = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        if match := re.match(rf"{re.escape(EYES)}([^.]+)\.(.+)", short):
            cameras[match[1]] = None
            short = EYES + match[2]
        plain[short] = read
    if len(cameras) != 1:
        names = ", ".join(cameras) or "none"
        raise ConversionError(f"{source}: expected a policy ({EYES}CAMERA.*) with one camera, found {names}")
    return plain, next(iter(cameras))


def _release_name(name: str, leaves: Mapping[str, Any], camera: str) -> str:
    """The name as a strict load wants it: with the camera, and as PEFT wraps layers that have low-rank factors."""
    wrapped = any(".lora." in path for path in leaves)
    if wrapped and re.search(
        r"(^|\.)(conv\d|downsample\.0)\.weight$|^(decoder|state_encoder)\.net\.\d+\.(weight|bias)$", name
    ):
        head, _, leaf = name.rpartition(".")
        name = f"{head}.base_layer.{leaf}"
    return name.replace(EYES, f"{EYES}{camera}.", 1)


def _sized(config: ConfigDict, tensors: Source, source: Path) -> ConfigDict:
    """The recipe with the sizes of the tensors."""
    config = config.copy_and_resolve_references()

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ConversionError(f"{source}: expected a BC policy of the release, found no {name}")
        return tensors[name]().shape

    def numbers(pattern: str) -> list[int]:
        return sorted({int(match[1]) for name in tensors if (match := re.match(pattern, name))})

    stages = numbers(rf"{re.escape(EYES)}layer(\d+)\.")
    decoder = numbers(r"decoder\.net\.(\d+)\.")
    actions = shape(f"{NORMALIZER}action.scale")[-1]
    outputs = shape(f"decoder.net.{decoder[-1] if decoder else 9}.weight")[0]
    if not stages or outputs % actions:
        raise ConversionError(
            f"{source}: expected stages layer1, ... and chunks of {actions} actions, found {outputs} outputs"
        )
    residual = "residual_net.head.weight" in tensors
    factors = [name for name in tensors if name.endswith(".lora_A.rl.weight")]
    with config.unlocked():
        c = config.policy
        c.widths = tuple(shape(f"{EYES}layer{i}.0.conv1.weight")[0] for i in stages)
        c.blocks = tuple(len(numbers(rf"{re.escape(EYES)}layer{i}\.(\d+)\.")) for i in stages)
        c.hidden = tuple(shape(f"decoder.net.{i}.weight")[0] for i in decoder[:-1])
        c.update({"action_dim": actions, "horizon": outputs // actions})
        c.rla.enabled = False
        state = numbers(r"state_encoder\.net\.(\d+)\.")
        c.state_dim = shape("state_encoder.net.0.weight")[1] if state else 0
        if state:
            c.state_hidden = tuple(shape(f"state_encoder.net.{i}.weight")[0] for i in state)
        c.residual.update({"enabled": residual or bool(factors), "lora_rank": shape(factors[0])[0] if factors else 0})
        if residual:
            c.executed = shape("residual_net.head.weight")[0] // (2 * actions)
            layers = numbers(r"residual_net\.backbone\.(\d+)\.")
            c.residual.hidden = tuple(shape(f"residual_net.backbone.{i}.weight")[0] for i in layers)
        config.observed.image_size = config.observed.image_size or 512
    return config.lock()


def _limits(normaliser: Mapping[str, np.ndarray], config: ConfigDict, source: Path) -> dict[str, np.ndarray]:
    """Our action and state statistics; ConversionError naming what is missing, misshapen or not finite."""
    problems, found = [], {}
    fields = {"action": config.policy.action_dim} | (
        {"state": config.policy.state_dim} if config.policy.state_dim else {}
    )
    for field, width in fields.items():
        for kind in ("scale", "offset"):
            value = normaliser.get(f"{NORMALIZER}{field}.{kind}")
            if value is None or value.shape != (width,) or not np.isfinite(value).all():
                shown = "none" if value is None else f"{value.shape}" if value.shape != (width,) else "NaN or infinity"
                problems.append(f"{NORMALIZER}{field}.{kind}: expected shape {(width,)}, finite, found {shown}")
            else:
                found[f"{field}_{kind}"] = value.astype(np.float32)
    for kind, expected in IMAGE.items():
        value = normaliser.get(f"{NORMALIZER}image.{kind}")
        if value is not None and not np.all(value == expected):
            problems.append(
                f"{NORMALIZER}image.{kind}: expected {expected}, which is built in here, found {value.ravel()[0]}"
            )
    if problems:
        raise ConversionError(f"{source}: the normaliser does not fit:\n" + "\n".join(f"  {line}" for line in problems))
    return found


def _filled(config: ConfigDict, leaves: dict[str, np.ndarray], limits: Mapping[str, np.ndarray]) -> Policy:
    """The policy; a critic, which the release keeps elsewhere, starts afresh."""
    policy = Policy(config, rngs=nnx.Rngs(0))
    if policy.critic is not None:
        leaves |= {f"critic.{path}": np.asarray(leaf) for path, leaf in flat_parameters(policy.critic).items()}
    fill(policy, leaves)
    for name, value in limits.items():
        getattr(policy, name).set_value(jnp.asarray(value))
    return policy


def _remember(normaliser: Mapping[str, np.ndarray], camera: str, folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {name: np.require(value, requirements="C") for name, value in normaliser.items()}
    save_file(tensors, folder / REMEMBERED, metadata={"camera": camera})


def _normaliser(policy: Policy, run: Path) -> tuple[dict[str, np.ndarray], str]:
    """The normaliser's tensors and the camera: as they came, or, for a policy trained here, what its limits say."""
    from safetensors import safe_open

    if not (run / REMEMBERED).exists():
        say("mean and std of the training data are not kept here: 0 and 1 are written; normalising does not read them")
        return dict(_made_up(policy)), CAMERA
    with safe_open(run / REMEMBERED, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["camera"]  # noqa: SIM118  no dict


def _made_up(policy: Policy) -> Iterator[tuple[str, np.ndarray]]:
    fields = ("action", "state") if policy.state_dim else ("action",)
    parts = {
        f: (np.asarray(getattr(policy, f"{f}_scale")[...]), np.asarray(getattr(policy, f"{f}_offset")[...]))
        for f in fields
    }
    for field, (scale, offset) in (
        parts | {"image": (np.array([2.0], np.float32), np.array([-1.0], np.float32))}
    ).items():
        low, high = ((end - offset) / scale for end in (-1, 1))
        values = dict(zip(STATISTICS, (low, high, np.zeros_like(low), np.ones_like(low)), strict=True))
        yield f"{NORMALIZER}{field}.scale", scale
        yield f"{NORMALIZER}{field}.offset", offset
        yield from ((f"{NORMALIZER}{field}.input_stats.{kind}", value) for kind, value in values.items())
