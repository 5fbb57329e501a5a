"""LPIPS weights in one file: VGG-16 (torchvision) and the linear heads (lpips), under their published names."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlawm_jax.convert.runs import conversion_report, save_tensors, whole_folder, write_report
from rlawm_jax.image_metrics import lpips_shapes
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.weights.rules import ConversionError, Rule, Source, Table, convert
from rlawm_jax.weights.sources import open_source

FILE = "lpips.safetensors"
TABLE = Table(
    "torchvision and lpips",
    tuple(Rule(name, (name,)) for name in ("features.{i}.weight", "features.{i}.bias", "lin{k}.model.1.weight")),
    ignored={"classifier.{i}.weight": "VGG's classifier", "classifier.{i}.bias": "VGG's classifier"},
)


def to_lpips(sources: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write a folder `output` with lpips.safetensors, from the files of VGG-16 and the heads or one that holds both.

    Reads torchvision's vgg16 state_dict with lpips' weights/v0.1/vgg.pth, or the state_dict of lpips.LPIPS(net="vgg").
    Raises ConversionError naming every tensor that is missing, misshapen or not finite.
    """
    with whole_folder(output) as folder:
        tensors = _merged(sources)
        shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in lpips_shapes().items()}
        leaves = convert(tensors, TABLE, shapes, f"{', '.join(map(str, sources))} as LPIPS (VGG-16)")
        save_tensors(folder / FILE, leaves)
        report = conversion_report("lpips", 0, {"lpips": leaves}) | {"from": [str(source) for source in sources]}
        write_report(report, folder)
    announce(f"use it as --lpips_weights={output / FILE}, or --config.lpips_weights in training")
    return report


def _merged(sources: Sequence[Path]) -> Source:
    """The tensors of all files, under the names of torchvision and of the published heads."""
    merged: dict[str, Any] = {}
    for source in sources:
        for name, read in open_source(source).items():
            # lpips.LPIPS holds VGG in slices, its heads twice, and two constants
            plain = re.sub(r"^(?:net\.slice\d+|vgg\.features)\.", "features.", name)
            if plain.startswith(("lins.", "scaling_layer.")):
                continue
            if plain in merged:
                raise ConversionError(f"{source}: {name}: expected once, found in another file too; leave one out")
            merged[plain] = read
    return merged
