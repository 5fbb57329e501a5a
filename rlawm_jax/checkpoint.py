"""The only home of orbax: what a checkpoint holds, how it is written, and how it is refused.

A checkpoint is one folder `workdir/checkpoints/<step>` with the training state, the untrained parts (all but the
backbone, which is identified by its fingerprint), the data iterator's position, and `meta`: config, fingerprint,
provenance. It needs nothing else to evaluate or to resume, apart from the backbone's own weights.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

STATE, FROZEN, DATA, META = "state", "frozen", "data", "meta"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


class Checkpointer:
    """Saves and restores the checkpoints of one run folder."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
        self.directory = Path(workdir).absolute() / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise CheckpointError(
                f"{workdir}: expected a run folder with checkpoints/, found none; train first or correct --workdir"
            )
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, read_only=read_only)
        handlers = {
            STATE: ocp.StandardCheckpointHandler(),
            FROZEN: ocp.StandardCheckpointHandler(),
            DATA: ocp.JsonCheckpointHandler(),
            META: ocp.JsonCheckpointHandler(),
        }
        # named up front, or a fresh process could not read the metadata of what another one wrote
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest committed checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, frozen: Any, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint in the background; the arrays may be donated as soon as this returns."""
        items = {
            STATE: ocp.args.StandardSave(state),
            FROZEN: ocp.args.StandardSave(frozen),
            DATA: ocp.args.JsonSave(data),
            META: ocp.args.JsonSave(meta),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def meta(self, step: int) -> dict[str, Any]:
        """Config and provenance stored with a checkpoint."""
        return self._restore(step, {META: ocp.args.JsonRestore()})[META]

    def data(self, step: int) -> dict[str, Any]:
        """The data iterator's position stored with a checkpoint."""
        return self._restore(step, {DATA: ocp.args.JsonRestore()})[DATA]

    def arrays(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The items `state` and `frozen` in the structure, dtypes and shardings of the abstract trees given."""
        for name, tree in abstract.items():
            self._check(step, name, tree)
        return self._restore(step, {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})

    def wait(self) -> None:
        """Block until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is being written and let go of the folder."""
        self._manager.close()

    def _restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except Exception as error:  # orbax, tensorstore and json each raise their own kinds for a damaged file
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)}: expected readable {', '.join(items)}, found: {reason}; "
                f"delete that folder to go on from an older checkpoint ({self.steps})"
            ) from error

    def _check(self, step: int, name: str, abstract: Any) -> None:
        """Compare names, shapes and dtypes before restoring: orbax would cast a dtype silently."""
        try:
            stored = _named(self._manager.item_metadata(step)[name])
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)}: expected readable metadata of {name}, found: "
                f"{type(error).__name__}; delete that folder to go on from an older checkpoint ({self.steps})"
            ) from error
        wanted = _named(abstract)
        problems = [f"missing {leaf}" for leaf in wanted.keys() - stored.keys()]
        problems += [f"unexpected {leaf}" for leaf in stored.keys() - wanted.keys()]
        problems += [
            f"{leaf} is {stored[leaf]}, expected {wanted[leaf]}"
            for leaf in wanted.keys() & stored.keys()
            if wanted[leaf] != stored[leaf]
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)}: {name} does not fit this config: {shown}; "
                f"use the config of the run, or another --workdir"
            )


def _named(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array by path, the same for live arrays, abstract ones and orbax metadata."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def config_from_meta(meta: dict[str, Any]) -> ConfigDict:
    """The locked config a checkpoint was made with."""
    config = ConfigDict(json.loads(meta["config"]))
    config.lock()
    return config
