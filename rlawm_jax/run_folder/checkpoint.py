"""The only module that uses orbax: what a checkpoint holds, how it is written and restored.

A checkpoint is one folder `workdir/checkpoints/<step>` with the training state, the untrained parts (all but the
backbone, which is identified by its fingerprint), the data's position, and `meta`: config, fingerprint, provenance.
Apart from the backbone's weights, nothing else is needed to evaluate or to resume.

It is written in the background as `<step>.saving`, then every file's checksum is stored in `manifest.json`, then the
folder gets its final name: a folder named by a number is complete. `integrity.py` decides whether it can be trusted
before anything is read. An old checkpoint is renamed to `<step>.deleting` before it is deleted, a damaged one to
`<step>.damaged`. In an object store, where folders cannot be renamed, a checkpoint is valid once it has a manifest.
"""

import hashlib
import logging
import os
import re
import shutil
import threading
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlawm_jax.hosts import exchange
from rlawm_jax.run_folder.integrity import (
    MANIFEST,
    CheckpointError,
    TrustedCheckpoints,
    absolute,
    committed_steps,
    first_few,
    flush_to_disk,
    is_local,
    write_manifest,
)
from rlawm_jax.run_folder.logging import announce

STATE, FROZEN, DATA, META = "state", "frozen", "data", "meta"
SAVING, DELETING = ".saving", ".deleting"


class Checkpointer:
    """Saves and restores the checkpoints of one run folder.

    The newest `keep` are kept, and those of every `keep_every`-th step (0: no others). A run that saves must be the
    only one in its folder: unfinished checkpoints of an interrupted run are removed when the folder is opened.
    `in_flight_gb` limits the memory a save uses beside the arrays, and so their size; by default there is no limit.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
        in_flight_gb: int | None = None,
    ):
        if keep < 1 or keep_every < 0:
            raise ValueError(
                f"config.train.keep_checkpoints, keep_every: expected at least 1 and 0, found {keep} and {keep_every}"
            )
        self.directory = absolute(workdir) / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{workdir}: expected a run folder with checkpoints/, found none; train first or correct the path"
            )
        self._keep, self._keep_every = keep, keep_every
        self._trusted = TrustedCheckpoints(self.directory, read_only=read_only)
        self._finishing: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        arrays, text = partial(ocp.PyTreeCheckpointHandler, save_concurrent_gb=in_flight_gb), ocp.JsonCheckpointHandler
        handlers: dict[str, Any] = {STATE: arrays(), FROZEN: arrays(), DATA: text(), META: text()}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        logging.getLogger("absl").addFilter(_unless_reported_elsewhere)
        if not read_only and jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    @property
    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first."""
        return committed_steps(self.directory)

    def latest(self) -> int | None:
        """Step of the newest committed checkpoint."""
        return max(self.steps, default=None)

    def latest_intact(self) -> int | None:
        """Step of the newest checkpoint that can be trusted, as `TrustedCheckpoints.newest` decides."""
        return self._trusted.newest()

    def save(self, step: int, state: Any, frozen: Any, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint in the background; the arrays may be donated as soon as this returns.

        Raises CheckpointError if it cannot begin (no space), or if the previous one failed meanwhile; in either case
        older checkpoints are intact. A step that is already saved is not saved again.
        """
        self.wait()
        final = self._folder(step)
        # of several processes only the first is sure to see the folder; all know what was restored and saved
        if step in self._trusted or (jax.process_count() == 1 and step in self.steps):
            return
        self.check_space((state, frozen))
        folder = self.directory / f"{step}{SAVING}" if is_local(final) else final
        items = {
            STATE: ocp.args.PyTreeSave(state),
            FROZEN: ocp.args.PyTreeSave(frozen),
            DATA: ocp.args.JsonSave(data),
            META: ocp.args.JsonSave(meta),
        }
        try:
            self._orbax.save(folder, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # orbax and tensorstore wrap file system errors in various types
            raise self._failed(step, error) from error
        self._trusted.add(step)
        self._finishing = threading.Thread(target=self._finish, args=(step, folder, final), name="finish_checkpoint")
        self._finishing.start()

    def check_space(self, trees: Any) -> None:
        """Raise CheckpointError if a checkpoint of these trees does not fit on the disk."""
        missing = 0
        if jax.process_index() == 0 and is_local(self.directory):
            need = int(1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(trees))) + 2**20
            free = shutil.disk_usage(self.directory).free
            missing = -(-max(need - free, 0) // 2**20)
        if missing := exchange(missing)[0]:
            raise CheckpointError(
                f"{self.directory}: expected space for a checkpoint, found {missing} MiB too little; older "
                f"checkpoints {self.steps} are intact; free some space on that disk"
            )

    def meta(self, step: int) -> dict[str, Any]:
        """Config and provenance stored with a checkpoint."""
        return self._restore(step, {META: ocp.args.JsonRestore()})[META]

    def checksum(self, step: int) -> str:
        """16 hex digits of the checkpoint's content; empty for one of an older version, which kept no checksums."""
        manifest = self._folder(step) / MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.exists() else ""

    def data(self, step: int) -> dict[str, Any]:
        """The data iterator's position stored with a checkpoint."""
        return self._restore(step, {DATA: ocp.args.JsonRestore()})[DATA]

    def arrays(self, step: int, *, partial: bool = False, **abstract: Any) -> dict[str, Any]:
        """The items `state` and `frozen` in the structure, dtypes and shardings of the abstract trees given.

        partial=True reads only the given leaves, such as parameters without the optimizer's moments.
        """
        self._trusted.check(step)
        for name, tree in abstract.items():
            self._check_fit(step, name, tree, partial=partial)
        wanted = {
            name: ocp.args.PyTreeRestore(
                item=tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=partial,
            )
            for name, tree in abstract.items()
        }
        return self._restore(step, wanted)

    @property
    def failed(self) -> bool:
        """Whether writing the last checkpoint failed, without waiting; `wait` raises the error."""
        return self._failure is not None

    def wait(self) -> None:
        """Block until everything is on disk; raises CheckpointError if it could not be written."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Finish what is being written and release orbax's resources."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _finish(self, step: int, folder: epath.Path, final: epath.Path) -> None:
        """In the background: wait for the arrays, write the manifest, give the folder its name, delete old ones."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(folder)
                if folder != final:
                    os.rename(folder, final)  # noqa: PTH104
                    flush_to_disk(self.directory)
        except BaseException as error:  # the training loop must learn of any failure
            self._failure = self._failed(step, error)
            return
        if jax.process_index() == 0:
            self._delete_old()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """Remove the files of a failed checkpoint; returns the error to raise."""
        self._trusted.discard(step)
        if jax.process_index() == 0:
            self._remove_leftovers(report=False)
        return CheckpointError(
            f"checkpoint {self._folder(step)}: could not be written: {_first_line(error)}; older checkpoints "
            f"{self.steps} are intact; free some space on that disk or repair its file system"
        )

    def _delete_old(self) -> None:
        steps = self.steps
        kept = {*steps[-self._keep :], *(s for s in steps if self._keep_every and s % self._keep_every == 0)}
        for step in steps:
            if step not in kept:
                self._delete(self._folder(step))

    def _delete(self, folder: epath.Path) -> None:
        """Delete a checkpoint so that a half-deleted one is never taken for a complete one."""
        try:
            if is_local(folder):
                if folder.name.isdecimal():
                    folder = folder.rename(self.directory / f"{folder.name}{DELETING}")
            else:
                (folder / MANIFEST).unlink(missing_ok=True)
            folder.rmtree(missing_ok=True)
        except OSError as error:  # costs only disk space: no reason to stop
            announce(f"{folder} could not be deleted ({_first_line(error)}); delete it by hand")

    def _remove_leftovers(self, report: bool = True) -> None:
        """Delete what an interrupted save or deletion left behind."""
        unfinished = [path for path in self.directory.iterdir() if path.is_dir() and _is_leftover(path)]
        for path in unfinished:
            self._delete(path)
        if unfinished and report:
            names = ", ".join(sorted(path.name for path in unfinished))
            announce(f"{self.directory}: removed unfinished checkpoints of an interrupted run: {names}")

    def _restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        self._trusted.check(step)
        try:
            return dict(self._orbax.restore(self._folder(step), args=ocp.args.Composite(**items)).items())
        except Exception as error:  # orbax, tensorstore and json raise different types for a damaged file
            raise CheckpointError(
                f"checkpoint {self._folder(step)}: expected readable {', '.join(items)}, found: {_first_line(error)}; "
                f"delete that folder to resume from an older checkpoint ({self.steps})"
            ) from error

    def _check_fit(self, step: int, name: str, abstract: Any, *, partial: bool) -> None:
        """Compare names, shapes and dtypes before restoring: orbax would cast a dtype silently."""
        try:
            metadata: Any = self._orbax.metadata(self._folder(step)).item_metadata
            stored = _named(metadata[name])
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._folder(step)}: expected readable metadata of {name}, found: "
                f"{type(error).__name__}; delete that folder to resume from an older checkpoint ({self.steps})"
            ) from error
        wanted = _named(abstract)
        problems = [f"missing {leaf}" for leaf in wanted.keys() - stored.keys()]
        problems += [f"unexpected {leaf}" for leaf in stored.keys() - wanted.keys() if not partial]
        problems += [
            f"{leaf} is {stored[leaf]}, expected {wanted[leaf]}"
            for leaf in wanted.keys() & stored.keys()
            if wanted[leaf] != stored[leaf]
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint {self._folder(step)}: {name} does not fit this config: {first_few(sorted(problems))}; "
                f"use the config of the run, or another --workdir"
            )


def _is_leftover(path: epath.Path) -> bool:
    """Whether a folder is an unfinished checkpoint of ours, not something a person keeps there."""
    if path.name.isdecimal():
        return not is_local(path) and not (path / MANIFEST).exists()
    return re.fullmatch(rf"\d+({SAVING}|{DELETING})?(\.orbax-checkpoint-tmp.*)?", path.name) is not None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _unless_reported_elsewhere(record: logging.LogRecord) -> bool:
    """Drop orbax's traceback of a failed save, which reaches the loop as an error anyway."""
    return "Handler Commit operations or the Commit" not in record.getMessage()


def _named(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array by path, the same for live arrays, abstract ones and orbax metadata."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
