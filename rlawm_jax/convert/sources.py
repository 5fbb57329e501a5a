"""Checkpoint files as lazily read tensors: .safetensors and .pt/.pth, single or sharded, or a folder of them."""

import json
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlawm_jax.convert.rules import ConversionError, Source

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
TORCH_INSTALL = "pip install torch==2.13.0"
INDEX = "model.safetensors.index.json"
# keys under which training scripts keep the state_dict inside a larger dict
NESTED = ("model_state_dict", "state_dict", "model")


def open_source(path: str | Path) -> Source:
    """Every tensor of a checkpoint by name, read when asked for.

    `path`: a .safetensors file, a .pt/.pth state_dict (loaded weights-only), a *.index.json of shards, or a folder
    holding one of these. Raises FileNotFoundError, or ConversionError for a damaged or unsafe file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; expected a .safetensors or .pth file, or a folder with one")
    if path.is_dir():
        path = _only_checkpoint(path)
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _torch(path)
    raise ConversionError(f"{path}: expected .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json")


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder; an index stands for its shards."""
    if (folder / INDEX).exists():
        return folder / INDEX
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        found = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ConversionError(f"{folder}: holds {len(found)} checkpoints ({names}); name the one to read")
    raise FileNotFoundError(f"{folder}: expected {INDEX}, or one .safetensors or .pth file; found none")


def _sharded(index: Path) -> Source:
    """The shards an index names, checked against its list of tensors."""
    try:
        where = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConversionError(f"{index}: not a whole shard index ({error}); fetch it again") from None
    shards = {name: index.parent / name for name in sorted(set(where.values()))}
    if absent := [name for name, file in shards.items() if not file.exists()]:
        raise FileNotFoundError(f"{index}: shards missing beside it: {', '.join(absent)}; fetch them again")
    opened = {name: _safetensors(file) for name, file in shards.items()}
    if lost := [tensor for tensor, shard in where.items() if tensor not in opened[shard]]:
        raise ConversionError(f"{index}: tensors listed but not in their shards: {', '.join(lost)}")
    return {tensor: opened[shard][tensor] for tensor, shard in where.items()}


def _safetensors(path: Path) -> Source:
    import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors asks for
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ConversionError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118  not a dict


def _torch(path: Path) -> Source:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: reading {path.suffix} files needs torch; run {TORCH_INSTALL}") from None
    try:
        # the memory map reads a tensor when it is touched; files older than torch 1.6 are not zips and have none
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ConversionError(
            f"{path}: not a whole state_dict that loads weights-only: it holds pickled objects, and reading them would "
            "run code from the file; save the plain state_dict instead"
        ) from None
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(f"{path}: not a whole state_dict that loads weights-only ({reason})") from None
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"{path}: expected a state_dict of tensors, bare or under one of {', '.join(NESTED)}")

    def read(tensor: Any) -> np.ndarray:
        # numpy gets no bfloat16 from torch; widening it to float32 is exact
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {name: partial(read, tensor) for name, tensor in state.items()}
