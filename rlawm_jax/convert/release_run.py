"""Converts a whole run folder of the release, with its config.yaml and the runs it was built on, to one of ours."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.release import dataset_references
from rlawm_jax.convert.parity import parity
from rlawm_jax.convert.release import KINDS, LATENT_SCALE, find_files, open_files, read_kind
from rlawm_jax.convert.release_config import UNREADABLE, lookup, shown_sizes
from rlawm_jax.convert.release_settings import FILE, Entry, ReleaseSettings, kind_of
from rlawm_jax.convert.runs import (
    SECTIONS,
    check_recipe,
    conversion_report,
    one_objective,
    save_run,
    whole_folder,
    write_report,
)
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.weights.backbone import load_backbone
from rlawm_jax.weights.rules import ConversionError, Source, collected

STAGES: tuple[str, ...] = (
    "image_decoder",
    "rla",
    "denoiser",
)  # in order of training: the last one present is the main run
CONFIG_FILE = "config.py"
OPEN = ("data.groups", "denoiser.action_dims")  # sections whose keys are names of datasets and robots


class Part(NamedTuple):
    """One run of the release: its folder, what its config.yaml says, its files by network, and their step."""

    folder: Path
    settings: ReleaseSettings
    files: dict[str, Path]
    step: int


def release_to_run(
    sources: Sequence[Path],
    output: Path,
    config: ConfigDict,
    *,
    official: ConfigDict,
    step: int | None = None,
    compare: bool = False,
) -> dict[str, Any]:
    """Write a run folder `output` that holds everything a run of the release needs; returns its report.

    `sources`: the run, and further runs (RLA, image decoder) that its config.yaml does not lead to. `config` supplies
    what neither weights nor config.yaml give: backbone weights, data root, evaluation. `step` is that of the main run;
    `compare` adds parity with PyTorch to the report. Beside the checkpoint is config.py, the recipe that reproduces it,
    as differences from configs/base.py, whose config is `official`. Raises ConversionError naming every contradiction.
    """
    with whole_folder(output) as folder:
        check_recipe(config, SECTIONS, "configs/maniskill.py:panda")
        parts = find_parts(sources, step)
        main = max(parts, key=STAGES.index)
        for kind, part in parts.items():
            announce(f"{kind}: step {part.step}, {', '.join(map(str, part.files.values()))}")
            if not part.settings.exists:
                announce(f"{part.folder}: no {FILE}: heads and training settings are taken from the recipe")
        config, from_yaml, silent = read_config(parts, main, config)
        for field, value in silent.items():
            announce(f"{FILE} does not give {field}: {value} is taken from the recipe")
        # loaded first and released at once, so that its memory is free again before the parts are read
        identity = load_backbone(config.backbone.name, config.backbone.weights)[1]
        converted = _read_parts(parts, config)
        report = conversion_report("release", parts[main].step, converted) | {
            "from": [str(file) for part in parts.values() for file in part.files.values()],
            "backbone": {"name": config.backbone.name, "fingerprint": identity},
            "taken_from_release": {field: f"{entry.value} ({entry.where})" for field, entry in from_yaml.items()},
            "taken_from_config": silent,
            "not_here": {k: v for part in parts.values() for k, v in part.settings.unmatched().items()},
            "last_action": config.data.last_action,
        }
        if compare:
            report["parity"] = {kind: _parity(kind, part, converted, config) for kind, part in parts.items()}
        save_run(tuple(parts), converted, one_objective(config, main), identity, report, folder)
        (folder / CONFIG_FILE).write_text(recipe(one_objective(config, main), official, report))
        write_report(report, folder)
    return report


def find_parts(sources: Sequence[Path], step: int | None) -> dict[str, Part]:
    """The runs by kind, in order of training: those given, and those that the main one's config.yaml refers to."""
    folders: dict[str, Path] = {}
    for source in sources:
        kind = kind_of(source) if source.is_dir() else None
        if kind is None:
            names = ", ".join(f"{network.name}_step*.pt" for networks in KINDS.values() for network in networks)
            raise FileNotFoundError(f"--source: expected a run folder of the release (one of {names}), found {source}")
        if kind in folders:
            raise ValueError(f"--source: expected one {kind} run, found {folders[kind]} and {source}; leave one out")
        folders[kind] = source
    main = max(folders, key=STAGES.index)
    settings = ReleaseSettings(_config_file(folders[main]))
    wanted = set(STAGES[: STAGES.index(main)]) - set(folders)
    folders |= settings.referenced_runs(wanted) if wanted else {}
    if main == "denoiser" and "rla" not in folders:
        named = f", though {settings.path} names {'; '.join(settings.paths())}" if settings.paths() else ""
        raise FileNotFoundError(
            f"{folders[main]}: expected the RLA run that this world model was trained on, found none{named}; "
            f"add it (--source={folders[main]},RLA_RUN), or convert the denoiser alone with --kind=denoiser"
        )
    parts = {}
    for kind in (kind for kind in STAGES if kind in folders):
        files, its_step = find_files(kind, folders[kind], step if kind == main else None)
        parts[kind] = Part(folders[kind], ReleaseSettings(_config_file(folders[kind])), files, its_step)
    return parts


def _config_file(folder: Path) -> Path:
    """The path of a run's config.yaml, given its folder or its ckpts/."""
    inside = folder / FILE
    return folder.parent / FILE if folder.name == "ckpts" and not inside.exists() else inside


def read_config(
    parts: Mapping[str, Part], main: str, config: ConfigDict
) -> tuple[ConfigDict, dict[str, Entry], dict[str, Any]]:
    """(config, what config.yaml gave by field, what only `config` gives) of the runs together.

    Tensors give sizes; each run's config.yaml gives the rest and is compared with the tensors. Raises ConversionError
    with one line per contradiction, for all runs together.
    """
    config = config.copy_and_resolve_references()
    shown: dict[str, tuple[Any, str]] = {}
    from_yaml = parts[main].settings.training_settings(main, config)
    problems: list[str] = []
    opened = {}
    with collected() as problem:
        for kind, part in parts.items():
            with problem():
                opened[kind] = open_files(kind, part.files)
    for kind, part in parts.items():
        sizes = {f: (value, why) for f, value, why in shown_sizes(kind, opened[kind]) if f != "backbone.name"}
        problems += [f"{part.settings.path}: {line}" for line in part.settings.problems()]
        problems += _strange_robots(kind, opened[kind], part)
        for field, entry in part.settings.network_settings(kind).items():
            if field in sizes and entry.value != sizes[field][0]:
                value, why = sizes[field]
                problems.append(f"{part.settings.path}: {entry.where}: expected {value} ({why}), found {entry.value}")
            from_yaml[field] = entry
        shown |= {field: size for field, size in sizes.items() if field not in shown}
    values = {field: entry.value for field, entry in from_yaml.items()}
    values |= {field: value for field, (value, _) in shown.items()}
    with config.unlocked():
        for field, value in values.items():
            _set(config, field, value)
        config.train.init_from = ""  # may be set in a recipe, but every part comes from the release
        config.data.action_statistics = "none"
        config.latent_scale.update({"value": LATENT_SCALE, "running": False})
        if groups := training_groups(parts[main].settings):
            config.data.groups = ConfigDict(groups)
    problems += _bad_heads(parts, config)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ConversionError(
            f"{parts[main].folder}: the settings and weights of the run contradict each other:\n{lines}"
        )
    silent = {f: lookup(config, f) for kind in parts for f in UNREADABLE[kind] if f not in values}
    return config.lock(), from_yaml, silent


def _set(config: ConfigDict, field: str, value: Any) -> None:
    *above, name = field.split(".")
    lookup(config, ".".join(above))[name] = ConfigDict(value) if isinstance(value, dict) else value


def _strange_robots(kind: str, sources: Mapping[str, Source], part: Part) -> list[str]:
    """Robots whose ids are not numbers: actions are routed by number here."""
    if kind != "denoiser":
        return []
    robots = {match[1] for name in sources["flow_model"] if (match := re.match(r"qpos_encoders\.([^.]+)\.", name))}
    return [
        f"{part.files['flow_model']}: qpos_encoders.{robot}: expected a robot's number"
        for robot in sorted(robots)
        if not robot.isdecimal()
    ]


def _bad_heads(parts: Mapping[str, Part], config: ConfigDict) -> list[str]:
    """Head counts that do not divide the width of their network."""
    return [
        f"{kind}.heads: expected a divisor of the width {config[kind].width}, found {config[kind].heads}"
        for kind in parts
        if "heads" in config[kind] and (config[kind].heads < 1 or config[kind].width % config[kind].heads)
    ]


def training_groups(settings: ReleaseSettings) -> dict[str, dict[str, Any]]:
    """config.data.groups from config.yaml; announced and empty if a group has no path in the release's tree."""
    groups = {}
    for name, group in (settings.groups() or {}).items():
        paths = group.pop("paths")
        datasets = [reference for path in paths for reference in dataset_references(path)]
        if not datasets:
            announce(f"{settings.path}: group {name}: no dataset matches {paths}; the recipe's groups are kept")
            return {}
        groups[name] = {"datasets": tuple(datasets), **group}
    return groups


def _parity(kind: str, part: Part, converted: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    own = {network.path: converted[network.path] for network in KINDS[kind]}
    return parity(kind, part.files, own, config)


def _read_parts(parts: Mapping[str, Part], config: ConfigDict) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters by module path; ConversionError with the report of every file that does not fit."""
    converted = {}
    with collected() as problem:
        for kind, part in parts.items():
            with problem():
                converted |= read_kind(kind, part.files, config)
    return converted


def recipe(config: ConfigDict, official: ConfigDict, report: Mapping[str, Any]) -> str:
    """A recipe file that gives `config`: configs/base.py, which gives `official`, plus every field that differs."""
    changes = [
        f"    config.{field} = {value!r}" for field, value in leaves(config) if _plain(lookup(official, field)) != value
    ]
    # a folder may have any name, and the file is executed: repr ensures that the name stays text
    about = f"The recipe of {report['from'][-1]} (step {report['step']}), as its conversion found it."
    return "\n".join(
        [
            repr(about),
            "",
            "from configs import base",
            "",
            "",
            "def get_config():",
            '    """configs/base.py with the settings of the released run."""',
            "    config = base.get_config()",
            *changes,
            "    return config",
            "",
        ]
    )


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, plain value) of a config; a section whose keys are data counts as one value."""
    for key, value in config.items():
        field = f"{prefix}{key}"
        if isinstance(value, ConfigDict) and field not in OPEN:
            yield from leaves(value, f"{field}.")
        else:
            yield field, _plain(value)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
