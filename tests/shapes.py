"""The type checker that tests put on the package: arrays' shapes and dtypes, and nothing else."""

import typing
from collections.abc import Callable

from beartype import beartype
from jaxtyping import AbstractArray


def arrays_only(function: Callable) -> Callable:
    """`beartype`, blind to every hint but arrays: stand-ins for modules and configs may look as they like."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _is_array(hint)}
    return beartype(function)


def _is_array(hint: object) -> bool:
    return any(isinstance(part, type) and issubclass(part, AbstractArray) for part in (hint, *typing.get_args(hint)))
