"""Checkpoint files as lazily read tensors: .safetensors and .pt/.pth, single or sharded, or a folder of them."""

import json
from functools import partial
from pathlib import Path

import numpy as np

from rlawm_jax.weights.pickles import PickledObjectsError
from rlawm_jax.weights.rules import ConversionError, Source, collected
from rlawm_jax.weights.torch_files import TENSORS, OtherFormatError, read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
INDEX = "model.safetensors.index.json"
# keys under which training scripts keep the state_dict inside a larger dict
NESTED = ("model_state_dict", "state_dict", "model")
POINTER = b"version https://git-lfs"


def open_source(path: str | Path) -> Source:
    """Every tensor of a checkpoint by name, read on demand.

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


def refuse_pointer(path: Path) -> None:
    """Raise ConversionError for a git-lfs pointer, which stands in for a file until it is fetched."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ConversionError(f"{path}: expected a checkpoint, found a git-lfs pointer to one; run `git lfs pull`")


def _only_checkpoint(folder: Path) -> Path:
    """The only checkpoint of a folder; an index stands for its shards."""
    if (folder / INDEX).exists():
        return folder / INDEX
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise ConversionError(f"{folder}: holds {len(files)} checkpoints ({names}); name the one to read")
    raise FileNotFoundError(f"{folder}: expected {INDEX}, or one .safetensors or .pth file; found none")


def _sharded(index: Path) -> Source:
    """The shards an index names, checked against its list of tensors."""
    refuse_pointer(index)
    try:
        where = json.loads(index.read_text())["weight_map"]
        if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
            raise ValueError("weight_map: expected the file of every tensor by its name")
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: not a complete shard index ({error}); fetch it again") from None
    shards = {name: index.parent / name for name in sorted(set(where.values()))}
    if absent := [name for name, file in shards.items() if not file.is_file()]:
        raise FileNotFoundError(f"{index}: shards missing beside it: {', '.join(absent)}; fetch them again")
    opened: dict[str, Source] = {}
    with collected() as problem:
        for name, file in shards.items():
            with problem():
                opened[name] = _safetensors(file)
    if lost := [tensor for tensor, shard in where.items() if tensor not in opened[shard]]:
        raise ConversionError(f"{index}: tensors listed but not in their shards: {', '.join(lost)}")
    return {tensor: opened[shard][tensor] for tensor, shard in where.items()}


def _safetensors(path: Path) -> Source:
    import ml_dtypes  # noqa: F401  gives numpy the bfloat16 that safetensors needs
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (AttributeError, TypeError, SafetensorError) as error:  # a dtype that numpy lacks
            raise ConversionError(f"expected a dense tensor of numbers, found {error}") from None

    return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118  not a dict


def _torch(path: Path) -> Source:
    refuse_pointer(path)
    try:
        state = read_torch_file(path)
    except PickledObjectsError:
        raise ConversionError(
            f"{path}: not a complete state_dict that loads weights-only: it holds pickled objects, and reading them "
            "would run code from the file; save the plain state_dict instead"
        ) from None
    except OtherFormatError as error:
        raise ConversionError(f"{path}: expected a state_dict as torch.save writes it, found {error}") from None
    except ValueError as error:
        raise ConversionError(f"{path}: not a complete {path.suffix} file ({error}); fetch it again") from None
    for key in NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    plain = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not plain or not all(isinstance(value, TENSORS) for value in state.values()):
        raise ConversionError(f"{path}: expected a state_dict of tensors, bare or under one of {', '.join(NESTED)}")
    return {name: tensor.read for name, tensor in state.items()}
