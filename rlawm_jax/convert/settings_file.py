"""Reads a config.yaml as entries with the keys that lead to them: complete, plain YAML only, so no code is run."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rlawm_jax.weights.rules import ConversionError

MOST, DEEPEST = 100_000, 50  # limits on entries and on nested sections; aliases can make both endless
Entry = tuple[tuple[str, ...], Any]


def read_entries(path: Path) -> list[Entry]:
    """Every entry of every mapping and every item of every list; one-line ConversionError if it is not such a file."""
    entries = list(islice(_entries(_read(path), ()), MOST))
    if len(entries) == MOST or any(len(keys) > DEEPEST for keys, _ in entries):
        raise ConversionError(f"{path}: expected a run's settings, found sections without end; fetch it again")
    return entries


class _Loader(yaml.SafeLoader):
    """Plain YAML, with Python's tuples as lists; nothing in it runs code."""


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def _read(path: Path) -> Any:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{path}: expected plain YAML, found {reason}; fetch it again") from None
    if not isinstance(tree, Mapping):
        raise ConversionError(f"{path}: expected settings by name, found {type(tree).__name__}; fetch it again")
    return tree


def _entries(tree: Any, path: tuple[str, ...]) -> Iterator[Entry]:
    if len(path) > DEEPEST:  # an alias of a section within itself
        return
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, str(key)), value
        yield from _entries(value, (*path, str(key)))
