"""Code shared by the entry points: the config flag, joining a cluster, one-line errors, quiet libraries."""

import difflib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rlawm_jax import hosts
from rlawm_jax.run_folder.checkpoint import CheckpointError

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, PermissionError, CheckpointError, FloatingPointError)

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of this job: on Cloud TPU, GKE, Slurm by itself, elsewhere by the next three.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 will listen.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def define_config() -> Any:
    """The --config flag: a file, an optional :variant, and --config.a.b=value overrides of a locked config."""
    return config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py[:variant].", lock_config=True)


def run_folder(text: str) -> Path:
    """A run folder from the command line; ValueError for an object store, whose URL would be taken for a local path."""
    if "://" in text:
        raise ValueError(
            f"--workdir: expected a folder of a file system that all hosts share (a lock is held and logs are appended "
            f"to in it), found {text}; mount the bucket, or use a network disk"
        )
    return Path(text).expanduser()


def run(main: Callable[[], None]) -> None:
    """Absl's app.run, except that an error the user can fix prints one line and exits with status 1."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; options are written --name=value")
        # orbax and jax are verbose at lower levels; we print what the user must know
        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("jax").setLevel(logging.WARNING)
        try:
            _join_cluster()
            main()
        except Exception as error:
            if isinstance(error, USER_ERRORS) and not _DEBUG.value:
                print(f"error: {error}", file=sys.stderr)
            elif hosts.joined():
                traceback.print_exc()
            else:
                raise
            hosts.leave(1)

    check_overrides(sys.argv)
    app.run(guarded)


def _join_cluster() -> None:
    place = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        hosts.join(*place)
    elif place != (None, None, None):
        raise ValueError("--coordinator, --num_processes, --process_id: expected --distributed with them, found none")


def check_overrides(argv: list[str]) -> None:
    """Exit with one line if the config is missing, or lacks a field that an override names (suggesting the nearest)."""
    path = _flag(argv, "config")
    if path is None:
        return
    if not Path(path.partition(":")[0]).is_file():
        _fail(f"--config: expected a recipe such as configs/pusht.py, found no file {path.partition(':')[0]}")
    try:
        config = config_flags.config_flags.ConfigFileFlagParser("config").parse(path)
    except ValueError as error:  # ml_collections embeds the config file's error in its traceback's text
        _fail(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    known = list(_names(config))
    for override in (a.lstrip("-").split("=", 1)[0] for a in argv if a.lstrip("-").startswith("config.")):
        name = override.removeprefix("config.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            _fail(f"--{override}: no such field in {path}; did you mean --config.{near[0]}?")


def _flag(argv: list[str], name: str) -> str | None:
    """The value of --name=value or --name value."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        flag, separator, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            return value if separator else following
    return None


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{key}.")
