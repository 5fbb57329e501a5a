"""The normaliser of a released policy: our policy uses its limits; the rest is kept in a separate file.

Statistics of the data (min, max, mean, std) have no place in our policy; from that file, they are converted back bit
for bit.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlawm_jax.convert.runs import save_tensors
from rlawm_jax.models.policy import Policy
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.weights.rules import ConversionError, Source

CAMERA = "front_lower_camera"
REMEMBERED = "normalizer.safetensors"
NORMALIZER = "normalizer.params_dict."
STATISTICS = ("min", "max", "mean", "std")
KNOWN = re.compile(
    rf"{re.escape(NORMALIZER)}(action|state|image)\.(scale|offset|input_stats\.({'|'.join(STATISTICS)}))"
)
IMAGE = {"scale": 2.0, "offset": -1.0}  # [0, 1] to [-1, 1], which our policy does itself


def _fields(config: ConfigDict) -> dict[str, int]:
    """The fields that the policy normalises, with their widths."""
    c = config.policy
    return {"action": c.action_dim} | ({"state": c.state_dim} if c.state_dim else {})


def read_normaliser(tensors: Source, config: ConfigDict, source: Path) -> dict[str, np.ndarray]:
    """The normaliser's tensors; ConversionError naming what is missing, unexpected, misshapen or not finite."""
    arrays, problems, fields = {}, [], _fields(config)
    for name in (name for name in tensors if name.startswith(NORMALIZER)):
        try:
            arrays[name] = tensors[name]()
        except ConversionError as error:
            problems.append(f"{name}: {error}")
            continue
        field, _, statistic = name.removeprefix(NORMALIZER).partition(".")
        shape, numeric = arrays[name].shape, jnp.issubdtype(arrays[name].dtype, jnp.floating)
        if not KNOWN.fullmatch(name):
            problems.append(f"{name}: unexpected: the policy has no such statistic")
        elif not numeric or not np.isfinite(arrays[name]).all():
            problems.append(f"{name}: " + ("holds NaN or infinity" if numeric else f"found {arrays[name].dtype}"))
        elif field in fields and shape != (fields[field],):
            problems.append(f"{name}: expected shape {(fields[field],)}, found {shape}")
        elif field == "image" and not np.all(arrays[name] == IMAGE.get(statistic, arrays[name])):
            problems.append(
                f"{name}: expected {IMAGE[statistic]}, the value that is fixed here, found {arrays[name].ravel()[0]}"
            )
    wanted = (f"{NORMALIZER}{field}.{kind}" for field in fields for kind in ("scale", "offset"))
    problems += [f"{name}: missing" for name in wanted if name not in tensors]
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise ConversionError(f"{source}: the normaliser does not fit:\n{lines}")
    return arrays


def limits_of(normaliser: Mapping[str, np.ndarray], config: ConfigDict) -> dict[str, np.ndarray]:
    """Our action and state limits, as scale and offset."""
    return {
        f"{field}_{kind}": normaliser[f"{NORMALIZER}{field}.{kind}"].astype(np.float32)
        for field in _fields(config)
        for kind in ("scale", "offset")
    }


def remember(normaliser: Mapping[str, np.ndarray], camera: str, folder: Path) -> None:
    """Save the normaliser's tensors unchanged beside the checkpoint."""
    tensors = {name: np.require(value, requirements="C") for name, value in normaliser.items()}
    save_tensors(folder / REMEMBERED, tensors, {"camera": camera})


def normaliser_of(policy: Policy, run: Path) -> tuple[dict[str, np.ndarray], str]:
    """The normaliser's tensors and the camera: as saved or, for a policy trained here, derived from its limits."""
    from safetensors import SafetensorError, safe_open

    path = run / REMEMBERED
    if not path.exists():
        announce(
            "mean and std of the training data are not stored: 0 and 1 are written; normalising does not read them"
        )
        return dict(_made_up(policy)), CAMERA
    try:
        with safe_open(path, framework="numpy") as file:
            camera = (file.metadata() or {}).get("camera", CAMERA)
            return {name: file.get_tensor(name) for name in file.keys()}, camera  # noqa: SIM118  no dict
    except SafetensorError as error:
        raise ConversionError(
            f"{path}: not a complete safetensors file ({error}); delete it to continue without it"
        ) from None


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
