"""From checkpoints of the release to a run folder of ours and back: whole folders with a report, or nothing."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlawm_jax.backbone import fingerprint, load_backbone
from rlawm_jax.checkpoint import Checkpointer
from rlawm_jax.convert.release import KINDS, LATENT_SCALE, fill, find_files, module_at, read_kind, state_dicts
from rlawm_jax.convert.release_config import UNREADABLE, lookup
from rlawm_jax.convert.rules import flat_parameters
from rlawm_jax.convert.sources import TORCH_INSTALL
from rlawm_jax.logging import say
from rlawm_jax.sharding import make_mesh
from rlawm_jax.training.setup import inherit_parts, init_model, load_world_model, provenance, without_external
from rlawm_jax.training.state import init_state, split_model
from rlawm_jax.training.step import make_objectives, make_transforms
from rlawm_jax.world_model import PARTS

REPORT = "conversion_report"


def to_run(kind: str, source: Path, output: Path, config: ConfigDict, *, step: int | None = None) -> dict[str, Any]:
    """A run folder `output` with one checkpoint that holds a kind of the release; returns its report.

    Parts trained by the run `config.train.init_from` are taken from there, so that conversions can be chained. The
    backbone's weights are read for their fingerprint: the release's files do not say which they were trained on.
    """
    with whole_folder(output) as folder:
        config = _config_of(kind, config)
        files, step = find_files(kind, source, step)
        say(f"{kind}: step {step}, {', '.join(map(str, files.values()))}")
        converted = read_kind(kind, files, config)
        unreadable = {field: lookup(config, field) for field in UNREADABLE[kind]}
        if unreadable:
            fields = ", ".join(f"{field}={value}" for field, value in unreadable.items())
            say(f"weights do not tell {fields}: taken from the config")
        identity = load_backbone(config.backbone.name, config.backbone.weights)[1]
        report = _report(kind, step, converted) | {
            "from": [str(file) for file in files.values()],
            "backbone": {"name": config.backbone.name, "fingerprint": identity},
            "taken_from_config": unreadable,
        }
        _save_run(kind, converted, config, identity, report, folder)
        _write_report(report, folder)
    return report


def _config_of(kind: str, config: ConfigDict) -> ConfigDict:
    """The config of the run: one objective; ValueError where the release's weights need other settings."""
    wanted = {"latent_scale.value": LATENT_SCALE, "latent_scale.running": False, "data.action_statistics": "none"}
    for field, value in wanted.items() if kind != "image_decoder" else ():
        if lookup(config, field) != value:
            raise ValueError(f"config.{field}: expected {value!r}, as in the release, found {lookup(config, field)!r}")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for part in PARTS:
            config.objectives[part].update({"enabled": part == kind, "start_step": 0, "stop_step": 0})
    return config.lock()


def _save_run(
    kind: str,
    converted: dict[str, dict[str, np.ndarray]],
    config: ConfigDict,
    identity: str,
    report: dict[str, Any],
    folder: Path,
) -> None:
    model = init_model(config, make_mesh(1, 1, 1, jax.devices()[:1]), None)
    inherited = inherit_parts(model, config, identity, skip=(kind,))
    for path, leaves in converted.items():
        fill(module_at(model, path), leaves)
    objectives = make_objectives(config)
    _, params, frozen = split_model(model, list(objectives))
    state = init_state(params, make_transforms(config, objectives), model.latent_scale[...])
    trained = [part for part in PARTS if part == kind or part in inherited]
    meta = provenance(config) | {"fingerprint": identity, "trained_parts": trained, "converted": report}
    state = state._replace(step=jnp.int32(report["step"]))
    checkpoints = Checkpointer(folder)
    checkpoints.save(report["step"], state, without_external(frozen), {}, meta)
    checkpoints.close()


def to_release(kind: str, source: Path, output: Path, *, step: int | None = None) -> dict[str, Any]:
    """A folder `output` with the state_dicts of one kind, as .safetensors and, where torch is installed, as .pt.

    `source` is a run folder of ours. Returns the report; raises ValueError for a part that the run did not train.
    """
    with whole_folder(output) as folder:
        model, config, meta = load_world_model(source, step=step)
        if kind not in meta["trained_parts"]:
            raise ValueError(f"{source}: expected a trained {kind}, found {', '.join(meta['trained_parts'])} only")
        say(f"{kind}: step {meta['step']} of {source}")
        with_torch = find_spec("torch") is not None
        if not with_torch:
            say(f"torch is not installed: .safetensors only, no .pt ({TORCH_INSTALL})")
        for name, tensors in state_dicts(kind, model, config):
            write_state_dict(folder / f"{name}_step{meta['step']:07d}", tensors, with_torch=with_torch)
        leaves = {network.path: flat_parameters(module_at(model, network.path)) for network in KINDS[kind]}
        report = _report(kind, meta["step"], leaves) | {
            "from": [str(source)],
            "backbone": {"name": config.backbone.name, "fingerprint": meta["fingerprint"]},
        }
        _write_report(report, folder)
    return report


def write_state_dict(stem: Path, tensors: dict[str, np.ndarray], *, with_torch: bool) -> None:
    """`stem`.safetensors and, on request, `stem`.pt: plain float32 state_dicts, loadable weights-only."""
    from safetensors.numpy import save_file

    save_file(tensors, stem.with_suffix(".safetensors"))
    if with_torch:
        import torch

        # arrays of jax are read-only, and torch asks for memory it may write
        state = {name: torch.from_numpy(np.require(t, requirements="W")) for name, t in tensors.items()}
        torch.save(state, stem.with_suffix(".pt"))


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` when all went well and vanishes when not.

    Raises FileExistsError where `output` already holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output: expected a folder to be made, found {output}; choose another or remove it")
    partial = output.absolute().parent / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _report(kind: str, step: int, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
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


def _write_report(report: dict[str, Any], folder: Path) -> None:
    """The report as JSON, and as a page for people."""
    (folder / f"{REPORT}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# Conversion of {report['kind']}, step {report['step']}", ""]
    lines += [f"From {', '.join(f'`{file}`' for file in report['from'])}.", ""]
    lines += ["| network | parameters | fingerprint |", "|---|---|---|"]
    lines += [f"| {path} | {n['parameters']:,} | `{n['fingerprint']}` |" for path, n in report["networks"].items()]
    lines += ["", "Backbone: {name}, fingerprint `{fingerprint}`.".format(**report["backbone"])]
    if taken := report.get("taken_from_config"):
        lines += ["", "Taken from the config, because weights do not tell: "]
        lines += [f"- {field} = {value}" for field, value in taken.items()]
    (folder / f"{REPORT}.md").write_text("\n".join(lines) + "\n")
