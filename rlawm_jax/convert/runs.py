"""Converts checkpoints of the release to our run folders and back: writes a whole folder with a report, or nothing."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from rlawm_jax import markdown
from rlawm_jax.convert.parity import TORCH_INSTALL, parity
from rlawm_jax.convert.release import KINDS, LATENT_SCALE, fill, find_files, module_at, read_kind, state_dicts
from rlawm_jax.convert.release_config import UNREADABLE, lookup
from rlawm_jax.run_folder.checkpoint import Checkpointer
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.run_folder.provenance import provenance
from rlawm_jax.training.restore import inherit_parts, load_world_model
from rlawm_jax.training.run import without_external
from rlawm_jax.training.state import TrainState, split_model
from rlawm_jax.training.step import make_objectives
from rlawm_jax.weights.backbone import fingerprint, load_backbone
from rlawm_jax.weights.rules import ConversionError, flat_parameters
from rlawm_jax.world_model import PARTS, WorldModel

REPORT = "conversion_report"
SECTIONS = ("backbone", "rla", "denoiser", "image_decoder", "latent_scale", "objectives", "data", "train")
LISTS = {
    "taken_from_release": "Taken from config.yaml:",
    "taken_from_config": "Taken from the recipe, because neither weights nor config.yaml give them:",
    "not_here": "In config.yaml and without a counterpart here:",
}


def to_run(
    kind: str, source: Path, output: Path, config: ConfigDict, *, step: int | None = None, compare: bool = False
) -> dict[str, Any]:
    """Write a run folder `output` with one checkpoint that holds a kind of the release; returns its report.

    Parts trained by the run `config.train.init_from` are taken from there, so that conversions can be chained. The
    backbone's weights are read for their fingerprint: the release's files do not say which ones they were trained on.
    `compare` adds parity with PyTorch to the report.
    """
    with whole_folder(output) as folder:
        check_recipe(config, SECTIONS, "configs/base.py")
        _check_release(kind, config)
        config = one_objective(config, kind)
        files, step = find_files(kind, source, step)
        announce(f"{kind}: step {step}, {', '.join(map(str, files.values()))}")
        # loaded first and released at once, so that its memory is free again before the networks are read
        identity = load_backbone(config.backbone.name, config.backbone.weights)[1]
        converted = read_kind(kind, files, config)
        unreadable = {field: lookup(config, field) for field in UNREADABLE[kind]}
        if unreadable:
            fields = ", ".join(f"{field}={value}" for field, value in unreadable.items())
            announce(f"weights do not determine {fields}: taken from the config")
        report = conversion_report(kind, step, converted) | {
            "from": [str(file) for file in files.values()],
            "backbone": {"name": config.backbone.name, "fingerprint": identity},
            "taken_from_config": unreadable,
        }
        if compare:
            report["parity"] = {kind: parity(kind, files, converted, config)}
        save_run((kind,), converted, config, identity, report, folder)
        write_report(report, folder)
    return report


def check_recipe(config: ConfigDict, sections: Sequence[str], example: str) -> None:
    """Raise ValueError for a recipe that lacks any of `sections`."""
    if missing := [section for section in sections if section not in config]:
        raise ValueError(f"--config: expected a recipe such as {example}, found one without {', '.join(missing)}")


def _check_release(kind: str, config: ConfigDict) -> None:
    """Raise ValueError if the data or latent-scale settings are not those that the release's weights need."""
    wanted = {"latent_scale.value": LATENT_SCALE, "latent_scale.running": False, "data.action_statistics": "none"}
    for field, value in wanted.items() if kind != "image_decoder" else ():
        if lookup(config, field) != value:
            raise ValueError(f"config.{field}: expected {value!r}, as in the release, found {lookup(config, field)!r}")


def one_objective(config: ConfigDict, kind: str) -> ConfigDict:
    """The config of a run that trains `kind` alone, from its first step to its last."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for part in PARTS:
            config.objectives[part].update({"enabled": part == kind, "start_step": 0, "stop_step": 0})
    return config.lock()


def save_run(
    kinds: Sequence[str],
    converted: dict[str, dict[str, np.ndarray]],
    config: ConfigDict,
    identity: str,
    report: dict[str, Any],
    folder: Path,
) -> None:
    """Write `folder` with one checkpoint of the converted parameters of `kinds`.

    `converted` is emptied. Parameters that are neither converted nor inherited are zero: they were never trained.
    """
    model = _blank_model(config)
    inherited = inherit_parts(model, config, identity, skip=kinds)
    for path, leaves in converted.items():
        fill(module_at(model, path), leaves)
    _, params, frozen = split_model(model, list(make_objectives(config)))
    trained = [part for part in PARTS if part in kinds or part in inherited]
    meta = provenance(config) | {"fingerprint": identity, "trained_parts": trained, "converted": report}
    # the release's optimizer state does not fit this program, and none is made up
    state = TrainState(jnp.int32(report["step"]), params, {}, model.latent_scale[...])
    largest = max(leaf.nbytes for leaf in jax.tree.leaves((params, frozen)))
    checkpoints = Checkpointer(folder, in_flight_gb=1 + largest // 10**9)
    checkpoints.save(report["step"], state, without_external(frozen), {}, meta)
    checkpoints.close()


def _blank_model(config: ConfigDict) -> WorldModel:
    """A world model of zeros, with the statistics of its constructor: memory that was never written costs nothing."""

    def build() -> WorldModel:
        return WorldModel(config, backbone=None, rngs=nnx.Rngs(0))

    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    constants = jax.jit(lambda: nnx.split(build(), nnx.Param, ...)[2])() if jax.tree.leaves(rest) else rest
    return nnx.merge(graphdef, _zeros(params), constants)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def to_release(kind: str, source: Path, output: Path, *, step: int | None = None) -> dict[str, Any]:
    """Write a folder `output` with one kind's state_dicts, as .safetensors and, where torch is installed, as .pt.

    `source` is one of our run folders. Returns the report; raises ValueError for a part that the run did not train.
    """
    with whole_folder(output) as folder:
        model, config, meta = load_world_model(source, step=step)
        if kind not in meta["trained_parts"]:
            raise ValueError(f"{source}: expected a trained {kind}, found {', '.join(meta['trained_parts'])} only")
        announce(f"{kind}: step {meta['step']} of {source}")
        for name, tensors in state_dicts(kind, model, config):
            write_state_dict(folder / f"{name}_step{meta['step']:07d}", tensors)
        leaves = {network.path: flat_parameters(module_at(model, network.path)) for network in KINDS[kind]}
        report = conversion_report(kind, meta["step"], leaves) | {
            "from": [str(source)],
            "backbone": {"name": config.backbone.name, "fingerprint": meta["fingerprint"]},
        }
        write_report(report, folder)
    return report


def write_state_dict(stem: Path, tensors: dict[str, np.ndarray]) -> None:
    """`stem`.safetensors and, where torch is installed, `stem`.pt: plain float32 state_dicts, loadable weights-only."""
    save_tensors(stem.with_suffix(".safetensors"), tensors)
    if find_spec("torch") is None:
        announce(f"torch is not installed: no {stem.name}.pt ({TORCH_INSTALL})")
        return
    import torch

    # jax arrays are read-only, and torch requires writable memory
    state = {name: torch.from_numpy(np.require(t, requirements="W")) for name, t in tensors.items()}
    try:
        torch.save(state, stem.with_suffix(".pt"))
    except RuntimeError as error:  # torch's writer raises this for any file-system error
        raise OSError(str(error).splitlines()[0]) from error


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file; OSError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` on success and is removed on failure.

    Anything that a killed conversion into the same `output` left unfinished is removed first. Raises FileExistsError if
    `output` already holds something, ConversionError if another conversion is writing to it or writing fails.
    """
    made: list[Path] = []
    try:
        output = _resolved(output)  # a folder cannot be renamed onto a link
        partial = output.with_name(f".{output.name}.partial")
        made = [parent for parent in partial.parents if not parent.exists()]
        with _held(partial):
            if left := list(partial.iterdir()):
                announce(f"{partial}: removing the remains of an interrupted conversion")
                for path in left:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            try:
                yield partial
                partial.rename(output)  # succeeds only if the target is absent or an empty folder
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        # our own messages, and errors that name a file, which may be the source
        ours = isinstance(error, FileExistsError) and error.errno is None
        if ours or isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ConversionError(
            f"--output: expected to write {output}, found: {error}; nothing was left there; fix this and run it again"
        ) from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it holds the output, or someone else's files
                parent.rmdir()


def _resolved(output: Path) -> Path:
    """The output's path without links; FileExistsError if something is already there."""
    try:
        output = output.resolve()
    except RuntimeError as error:  # circular links
        raise FileExistsError(f"--output: expected a folder that does not exist yet, found {error}") from None
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"--output: expected a folder that does not exist yet, found {output}; choose another or remove it"
        )
    return output


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Create the folder if needed and hold it exclusively, by a kernel lock that is released with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # renamed or removed meanwhile: another conversion held it and has finished
            free = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
        except OSError as error:
            free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # any other error: a file system without locks
        if not free:
            raise ConversionError(f"--output: expected no other conversion into it, found one running in {folder}")
        yield
    finally:
        os.close(lock)


def conversion_report(kind: str, step: int, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A summary of the conversion: kind, step, and parameter count and fingerprint of every network."""
    return {
        "kind": kind,
        "step": step,
        "networks": {
            path: {
                "parameters": sum(int(np.prod(leaf.shape)) for leaf in leaves.values()),
                "fingerprint": fingerprint(leaves),
            }
            for path, leaves in parts.items()
        },
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write the report as JSON and as Markdown."""
    (folder / f"{REPORT}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# Conversion of {report['kind']}, step {report['step']}", ""]
    lines += [f"From {', '.join(f'`{file}`' for file in report['from'])}.", ""]
    networks = [(path, f"{n['parameters']:,}", f"`{n['fingerprint']}`") for path, n in report["networks"].items()]
    lines += [markdown.table(("network", "parameters", "fingerprint"), networks)]
    if backbone := report.get("backbone"):
        lines += ["", "Backbone: {name}, fingerprint `{fingerprint}`.".format(**backbone)]
    for kind, stages in report.get("parity", {}).items():
        lines += ["", f"{kind} against PyTorch, largest absolute deviation on unit normal inputs:", ""]
        rows = [(name, f"{s['rms']:.2g}", f"{s['float32']:.1e}", f"{s['bfloat16']:.1e}") for name, s in stages.items()]
        lines += [markdown.table(("stage", "output's rms", "float32", "bfloat16"), rows)]
    for key, title in LISTS.items():
        if entries := report.get(key):
            lines += ["", title, "", *(f"- {field} = {value}" for field, value in entries.items())]
    (folder / f"{REPORT}.md").write_text("\n".join(lines) + "\n")
