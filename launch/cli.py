"""What the entry points share: the config flag, one-line errors, quiet libraries."""

import difflib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rlawm_jax.checkpoint import CheckpointError

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, PermissionError, CheckpointError, FloatingPointError)

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def define_config() -> Any:
    """The --config flag: a file, an optional :variant, and --config.a.b=value overrides of a locked config."""
    return config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py[:variant].", lock_config=True)


def run(main: Callable[[], None]) -> None:
    """Absl's app.run, where an error the user can mend is one line and exit status 1."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; options are written --name=value")
        # orbax and jax narrate at lower levels; what a user must know comes from us
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("jax").setLevel(logging.WARNING)
        try:
            main()
        except USER_ERRORS as error:
            if _DEBUG.value:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    check_overrides(sys.argv)
    app.run(guarded)


def check_overrides(argv: list[str]) -> None:
    """Exit with the nearest valid name where an override names a field the config does not have."""
    path = next((a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config=")), None)
    overrides = [a.lstrip("-").split("=", 1)[0] for a in argv if a.lstrip("-").startswith("config.")]
    if path is None or not overrides:
        return
    config = config_flags.config_flags.ConfigFileFlagParser("config").parse(path)
    known = list(_names(config))
    for override in overrides:
        name = override.removeprefix("config.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            print(f"error: --{override}: no such field in {path}; did you mean --config.{near[0]}?", file=sys.stderr)
            sys.exit(1)


def _names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{key}.")
