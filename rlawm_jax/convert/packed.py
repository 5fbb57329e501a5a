"""A trained model in one small file, to keep in a repository or to send: bfloat16 parameters and their provenance.

The file is a zip: `meta.json` (the checkpoint's config and provenance, and every array's name, shape and kind), `high`
and `low` (the upper and lower bytes of all parameters; apart, the upper ones compress to less than half), `exact`
(statistics, in float32). Unpacked it is a run folder like any other, without an optimizer's state.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlawm_jax.convert.runs import whole_folder
from rlawm_jax.models.policy import Policy
from rlawm_jax.policy.checkpoint import load_policy, save_policy
from rlawm_jax.run_folder.checkpoint import Checkpointer
from rlawm_jax.run_folder.config import config_from_meta
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.training.run import without_external
from rlawm_jax.training.state import TrainState, split_model
from rlawm_jax.training.step import make_objectives
from rlawm_jax.weights.rules import ConversionError
from rlawm_jax.world_model import WorldModel

FORMAT = "rlawm_jax parameters, version 1"


def pack(workdir: Path, file: Path, *, step: int | None = None) -> dict[str, Any]:
    """Write the parameters of a run's newest checkpoint, or of `step`, to `file`; returns what its meta.json says.

    `workdir` is the run of a world model or of a policy. Errors are one line each.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--file: expected a folder {file.parent} to write into, found none; make it first")
    checkpoints = Checkpointer(workdir, read_only=True)
    try:
        step = checkpoints.latest_intact() if step is None else step
        meta = checkpoints.meta(step) if step in checkpoints.steps else {}
    finally:
        checkpoints.close()
    if "policy" in json.loads(meta.get("config", "{}")):
        module: Any = load_policy(workdir, step=step)[0]
    else:
        module, _, meta = load_world_model(workdir, step=step)
    arrays = _flat(nnx.state(module))
    named = [(name, isinstance(variable, nnx.Param), np.asarray(variable.get_value())) for name, variable in arrays]
    meta = {
        "format": FORMAT,
        "step": step,
        "checkpoint": {key: value for key, value in meta.items() if key not in ("step", "checksum")},
        "arrays": [[name, list(array.shape), "bfloat16" if rounded else "float32"] for name, rounded, array in named],
    }
    words = _joined([a for _, rounded, a in named if rounded], jnp.bfloat16).view(np.uint8).reshape(-1, 2)
    exact = _joined([a for _, rounded, a in named if not rounded], np.float32)
    partial = file.with_name(f".{file.name}.partial")  # an earlier file stays whole until this one is
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        packed.writestr("meta.json", json.dumps(meta))
        packed.writestr("high", words[:, 1].tobytes())
        packed.writestr("low", words[:, 0].tobytes())
        packed.writestr("exact", exact.tobytes())
    partial.replace(file)
    return meta


def unpack(file: Path, workdir: Path, *, world_model: str = "") -> dict[str, Any]:
    """Make the run folder `workdir` from a packed file; returns its meta.json.

    `world_model` is where a policy's world model is on this machine, if not where it was trained.
    Raises ConversionError in one line for a file that is no such file, is damaged, or does not fit this version;
    nothing is left then.
    """
    meta, arrays = _read(file)
    config = config_from_meta(meta["checkpoint"])
    policy = "policy" in config
    if world_model and not policy:
        raise ValueError(f"--world_model: expected it with a policy's file, found {file}, a world model's")
    if world_model:
        config.world_model = world_model

    def build() -> Policy | WorldModel:
        rngs = nnx.Rngs(0)
        return Policy(config, rngs=rngs) if policy else WorldModel(config, backbone=None, rngs=rngs)

    module: Any = nnx.eval_shape(build)
    for name, variable in _flat(nnx.state(module)):
        if (array := arrays.pop(name, None)) is None or array.shape != variable.get_value().shape:
            raise ConversionError(
                f"{file}: expected {name} of shape {list(variable.get_value().shape)}, found "
                f"{'nothing' if array is None else list(array.shape)}; it was packed by another version "
                f"({meta['checkpoint'].get('git', 'unknown')})"
            )
        variable.set_value(jnp.asarray(array))
    with whole_folder(workdir) as folder:
        if policy:
            save_policy(folder, config, module, meta["step"])
        else:
            _save_world_model(module, config, meta, folder)
        (folder / "packed.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def _save_world_model(model: WorldModel, config: Any, meta: dict[str, Any], folder: Path) -> None:
    _, params, frozen = split_model(model, list(make_objectives(config)))
    state = TrainState(jnp.int32(meta["step"]), params, {}, model.latent_scale[...])
    checkpoints = Checkpointer(folder)
    checkpoints.save(meta["step"], state, without_external(frozen), {}, meta["checkpoint"])
    checkpoints.close()


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The file's meta.json and its arrays in float32; zip verifies the checksums."""
    wanted = f"{file}: expected a file written by launch.pack"
    if not file.is_file():
        raise FileNotFoundError(f"{wanted}, found none; correct --file")
    try:
        with zipfile.ZipFile(file) as packed:
            meta = json.loads(packed.read("meta.json"))
            if meta.get("format") != FORMAT:
                raise ConversionError(f"{wanted} ({FORMAT}), found {meta.get('format')!r}")
            high, low, exact = (np.frombuffer(packed.read(name), np.uint8) for name in ("high", "low", "exact"))
        words = np.stack([low, high], axis=1).view(jnp.bfloat16)
        streams = {"bfloat16": words.ravel().astype(np.float32), "float32": exact.view(np.float32)}
        taken, arrays = dict.fromkeys(streams, 0), {}
        for name, shape, kind in meta["arrays"]:
            start, size = taken[kind], int(np.prod(shape))
            arrays[name] = streams[kind][start : start + size].reshape(shape)
            taken[kind] += size
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{wanted}, found: {error}; fetch it again") from None
    return meta, arrays


def _flat(state: nnx.State) -> list[tuple[str, nnx.Variable]]:
    """The variables of a module by dotted name, without keys of random numbers."""
    flat = [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]
    return sorted((name, variable) for name, variable in flat if not isinstance(variable, nnx.RngState))


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype).ravel() for array in arrays)])
