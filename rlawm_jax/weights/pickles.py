"""Policy checkpoints that are pickles: the tensors come out, every other object becomes a husk that does nothing.

The release saves policies with dill, together with configs and training state of classes that are not installed here.
Nothing that a pickle names is imported or called, apart from what rebuilds tensors; asking for --allow_pickle all the
same leaves the decision to open such a file with the user.
"""

import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlawm_jax.weights.rules import ConversionError

WEIGHTS = ("ema_model", "model")  # the averaged weights act; they come first
ZIP = b"PK\x03\x04"  # how torch.save begins; for anything else torch has readers of its own, which trust the file


class Husk(dict):
    """Stands for any object of a pickle that is not a tensor; takes every state and answers every call with a husk."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> "Husk":
        return Husk()

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget it."""

    def append(self, item: Any) -> None:
        """Forget it."""

    def extend(self, items: Any) -> None:
        """Forget them."""

    def add(self, item: Any) -> None:
        """Forget it."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)


class TensorUnpickler(pickle.Unpickler):
    """Finds what rebuilds tensors and plain containers, and husks."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a pickle's GLOBAL; a husk for all but a few."""
        import torch
        import torch._utils as rebuild

        if module == "torch" and (name.endswith("Storage") or name in ("Size", "device")):
            return getattr(torch, name, Husk)
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(rebuild, name)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return Husk


def _load(file: Any, **options: Any) -> Any:
    return TensorUnpickler(file, **options).load()


def load_pickled_policy(path: Path) -> dict[str, Any]:
    """The averaged weights of a policy checkpoint, by name; ConversionError where it holds none."""
    import torch

    loader: Any = SimpleNamespace(Unpickler=TensorUnpickler, load=_load, __name__="pickle")
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:
                raise ValueError("another format than torch.save writes")
        payload = torch.load(path, map_location="cpu", weights_only=False, pickle_module=loader)
        states = payload["state_dicts"]
        name = next(name for name in WEIGHTS if isinstance(states.get(name), dict))
        return {key: value for key, value in states[name].items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ConversionError(
            f"{path}: expected a policy checkpoint with state_dicts ({' or '.join(WEIGHTS)}), found {reason}; "
            "fetch it again"
        ) from None
