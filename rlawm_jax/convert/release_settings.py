"""Reads a release run's config.yaml: settings by key, wherever they are nested, and the runs it was built on.

Weights determine every size they show; config.yaml gives the rest (heads above all) and is compared with the weights.
Its keys are looked up by name, not by place, because sections differ between the release's trainers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rlawm_jax.convert.release import KINDS, LATENT_SCALE, find_steps
from rlawm_jax.convert.release_config import lookup
from rlawm_jax.convert.settings_file import read_entries
from rlawm_jax.weights.rules import ConversionError

FILE = "config.yaml"
NETWORKS = {"rla": ("encoder", "decoder"), "denoiser": ("flow_model",), "image_decoder": ("decoder", "image_decoder")}
# sections that do not describe what was trained
ASIDE = re.compile(r"(.*_)?(val|valid|validation|eval|test|snapshot)(_.*)?")


class Entry(NamedTuple):
    """A value of config.yaml and the dotted path to it."""

    where: str
    value: Any


class Setting(NamedTuple):
    """One of our fields, its possible keys in config.yaml, and how its value is read."""

    field: str
    keys: tuple[str, ...]
    read: Callable[[Any], Any]


class Constant(NamedTuple):
    """A key and the only value of it with which the release's networks compute the same as ours."""

    key: str
    value: Any


def _whole(value: Any) -> int:
    number = float(value)  # YAML 1.1 reads 1e6 as text
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError("an integer")
    return int(number)


def _robots(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError("robot ids with the width of their rows")
    return {str(robot): _whole(width) for robot, width in value.items()}


def _horizon(value: Any) -> tuple[int, int]:
    low, high = map(_whole, value)
    if not 2 <= low <= high:
        raise ValueError
    return low, high


def _share(value: Any) -> float:
    if not 0 <= float(value) < 1:
        raise ValueError
    return float(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _sampling(value: Any) -> str:
    return "beta" if _switch(value) else "uniform"


_BLOCKS = (Setting("{part}.heads", ("num_heads", "n_heads", "heads"), _whole),)
NETWORK_SETTINGS = {
    "rla": (
        *_BLOCKS,
        Setting("rla.depth", ("num_blocks", "depth", "num_layers"), _whole),
        Setting("rla.mlp_ratio", ("mlp_ratio",), float),
        Setting("rla.num_tokens", ("num_tokens",), _whole),
        Setting("rla.token_dim", ("token_dim",), _whole),
    ),
    "denoiser": (
        *_BLOCKS,
        Setting("denoiser.cond_depth", ("num_cond_blocks",), _whole),
        Setting("denoiser.flow_depth", ("num_flow_blocks",), _whole),
        Setting("denoiser.mlp_ratio", ("mlp_ratio",), float),
        Setting("denoiser.action_dims", ("robot_qpos_dims",), _robots),
        Setting("data.max_horizon", ("max_horizon",), _whole),
    ),
    "image_decoder": (),
}
TRAINING_SETTINGS = (
    Setting("data.batch_size", ("batch_size",), _whole),
    Setting("data.min_num_frames", ("min_num_frames",), _whole),
    Setting("data.val_episodes", ("start_traj_id",), _whole),
    Setting("data.interaction.prob", ("interaction_prob",), float),
    Setting("data.horizon_sampling", ("nonlinear_sampling",), _sampling),
    Setting("data.last_action", ("directly_use_target_qpos",), _switch),
    Setting("data.mask_top", ("bg_mask_top",), _share),
    Setting("optimizer.learning_rate", ("lr", "learning_rate"), float),
    Setting("optimizer.weight_decay", ("weight_decay",), float),
    Setting("train.accumulate", ("batch_split",), _whole),
    Setting("train.steps", ("max_steps",), _whole),
    Setting("train.checkpoint_every", ("i_save",), _whole),
    Setting("objectives.{part}.l1", ("lambda_l1",), float),
    Setting("objectives.{part}.mse", ("lambda_mse",), float),
    Setting("objectives.{part}.ssim", ("lambda_ssim",), float),
    Setting("objectives.{part}.lpips", ("lambda_lpips",), float),
)
# the release's defaults for keys that config.yaml does not set: our field, its key, value
DEFAULTS = (
    ("data.horizon_sampling", "nonlinear_sampling", "beta"),
    ("data.last_action", "directly_use_target_qpos", False),
    ("data.mask_top", "bg_mask_top", 0.0),
)
CONSTANTS = (
    Constant("latent_scalar_normalization", LATENT_SCALE),
    Constant("use_centroid_per_dim_normalization", False),
    Constant("use_task_horizon_embedding", False),
    Constant("norm_output_tokens", False),
)
# training settings that have no field here: (key, value that need not be reported)
UNMATCHED = (("ema_rate", []), ("grad_clip", None))


class ReleaseSettings:
    """The entries of one config.yaml; none if the file is missing."""

    def __init__(self, path: Path) -> None:
        self.path, self.exists = path, path.is_file()
        self._entries = read_entries(path) if self.exists else []

    def find(self, keys: tuple[str, ...], networks: tuple[str, ...] | None = None) -> Entry | None:
        """The one value of a key, wherever it is; ConversionError if two places disagree.

        With `networks`, entries below a section of such a name take precedence; those of other networks are ignored.
        """
        named = [(path, value) for path, value in self._entries if path[-1] in keys]
        main = [entry for entry in named if not any(ASIDE.fullmatch(piece) for piece in entry[0][:-1])]
        chosen = main
        if networks is not None:
            others = {name for names in NETWORKS.values() for name in names} - set(networks)
            own = [entry for entry in main if any(piece in networks for piece in entry[0][:-1])]
            chosen = own or [entry for entry in main if not any(piece in others for piece in entry[0][:-1])]
        if not chosen:
            return None
        entries = [Entry(".".join(path), value) for path, value in chosen]
        if any(entry.value != entries[0].value for entry in entries):
            places = ", ".join(f"{entry.value!r} at {entry.where}" for entry in entries)
            raise ConversionError(f"{self.path}: {'/'.join(keys)}: expected one value, found {places}")
        return entries[0]

    def read(self, setting: Setting, part: str, networks: tuple[str, ...] = ()) -> tuple[str, Entry] | None:
        """(our field, value with its place) of a setting; None if config.yaml does not give it."""
        entry = self.find(setting.keys, networks)
        if entry is None or entry.value is None:
            return None
        try:
            value = setting.read(entry.value)
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"{self.path}: {entry.where}: expected {_wanted(setting, error)}, found {entry.value!r}"
            ) from None
        return setting.field.format(part=part), Entry(entry.where, value)

    def network_settings(self, kind: str) -> dict[str, Entry]:
        """Its settings for a kind's networks, by our field."""
        read = (self.read(setting, kind, NETWORKS[kind]) for setting in NETWORK_SETTINGS[kind])
        return dict(entry for entry in read if entry)

    def training_settings(self, kind: str, config: ConfigDict) -> dict[str, Entry]:
        """Its settings for the data and the optimizer of a run, by our field, without fields that `kind` lacks."""
        read = [self.read(setting, kind) for setting in TRAINING_SETTINGS]
        fields = dict(entry for entry in read if entry and _has(config, entry[0]))
        if rate := fields.get("optimizer.learning_rate"):
            fields["optimizer.learning_rate"] = rate._replace(value=rate.value / config.objectives[kind].lr_scale)
        horizon = self.read(Setting("data.horizon", ("horizon",), _horizon), kind)
        if horizon and kind != "image_decoder":  # which reads single frames
            for field, value in zip(("data.min_horizon", "data.max_horizon"), horizon[1].value, strict=True):
                fields[field] = Entry(horizon[1].where, value)
        if self.exists:
            for field, key, default in DEFAULTS:
                fields.setdefault(field, Entry(f"{key}, not set", default))
        return fields

    def problems(self) -> Iterator[str]:
        """One line per key under which the weights would mean something else here."""
        for key, expected in CONSTANTS:
            entry = self.find((key,))
            if entry is not None and entry.value is not None and entry.value != expected:
                yield f"{entry.where}: expected {expected!r}, the only supported value, found {entry.value!r}"

    def unmatched(self) -> dict[str, Any]:
        """Settings of the release that have no counterpart here, as {place: value}."""
        entries = ((self.find((key,)), plain) for key, plain in UNMATCHED)
        return {f.where: f.value for f, plain in entries if f is not None and f.value not in (plain, None)}

    def groups(self) -> dict[str, dict[str, Any]] | None:
        """The training groups: name -> {"paths", "weight", "min_start_frame"}; None if there are none."""
        entry = self.find(("groups",))
        if entry is None:
            return None
        if not isinstance(entry.value, Mapping) or not all(isinstance(g, Mapping) for g in entry.value.values()):
            raise ConversionError(f"{self.path}: {entry.where}: expected groups by name, found {entry.value!r}")
        return {str(name): self._group(f"{entry.where}.{name}", group) for name, group in entry.value.items()}

    def _group(self, where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with its paths as a list and its numbers as numbers."""
        try:
            paths = group.get("paths") or []
            paths = [paths] if isinstance(paths, str) else [str(path) for path in paths]
            weight, first = float(group.get("w", 1.0)), _whole(group.get("min_start_frame", 0))
        except (TypeError, ValueError):
            raise ConversionError(
                f"{self.path}: {where}: expected paths, a weight w, an integer min_start_frame, found {dict(group)!r}"
            ) from None
        return {"paths": paths, "weight": weight, "min_start_frame": first}

    def referenced_runs(self, kinds: set[str]) -> dict[str, Path]:
        """Run folders of `kinds` that its paths refer to, wherever the release's tree is now."""
        runs: dict[str, Path] = {}
        for path, value in self._entries:
            folder = _locate(value, self.path.parent) if isinstance(value, str) and "/" in value else None
            kind = kind_of(folder) if folder else None
            if folder is None or kind not in kinds:
                continue
            if runs.setdefault(kind, folder) != folder:
                raise ConversionError(
                    f"{self.path}: {'.'.join(path)}: expected one {kind} run, found {runs[kind]} and {folder}; "
                    f"add the one to use to --source"
                )
        return runs

    def paths(self) -> list[str]:
        """Everything that looks like a path to a run, for messages."""
        return [f"{'.'.join(path)}: {value}" for path, value in self._entries if _looks_like_run(value)]


def kind_of(folder: Path) -> str | None:
    """The kind whose files a folder (or its ckpts/) holds; None for another folder."""
    for kind in ("denoiser", "rla", "image_decoder"):  # an RLA run holds a `decoder` too
        if all(find_steps(folder, network) for network in KINDS[kind]):
            return kind
    return None


def _locate(text: str, run: Path) -> Path | None:
    """The folder on this machine that matches a path on the authors' machine in its trailing components."""
    pieces = [piece for piece in Path(text).parts if piece not in ("/", "..", ".")]
    if pieces and Path(pieces[-1]).suffix in (".pt", ".safetensors", ".yaml"):
        pieces.pop()
    if pieces and pieces[-1] == "ckpts":
        pieces.pop()
    for count in range(len(pieces), 1, -1):
        for above in (*run.absolute().parents, Path.cwd()):
            if (folder := above.joinpath(*pieces[-count:])).is_dir():
                return folder.resolve()
    return None


def _looks_like_run(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"/\d{8}_\d{2}-\d{2}-\d{2}", value))


def _has(config: ConfigDict, field: str) -> bool:
    try:
        lookup(config, field)
    except KeyError:
        return False
    return True


def _wanted(setting: Setting, error: Exception) -> str:
    plain = {
        _whole: "an integer",
        float: "a number",
        _horizon: "two numbers of frames, 2 or more, in ascending order",
        _share: "a share in [0, 1)",
    }
    return plain.get(setting.read, str(error))
