"""The release's evaluation handles: the exact windows behind its reported numbers, located in our datasets.

A handle names a trajectory by its folder on the authors' machine; only the trailing parts of that path are used here
(robot, task and group, or the IWS task), so neither the root nor the working directory matters. METHOD.md 13.6 and
13.7.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data.pipeline import WindowLoader
from data.release import dataset_and_split, is_iws
from data.windows import Window
from rlawm_jax import markdown
from rlawm_jax.evaluation import chunking
from rlawm_jax.evaluation.open_loop import OpenLoop, Progress, episode_numbers, settings
from rlawm_jax.evaluation.results import SINGLE, Errors, Evaluation, Result, summarise

PROTOCOLS = ("release", "exact")
KEYS = ("dataset_root", "traj_id", "frame_id", "sampled_horizon")
SHOWN = 8  # offending handles listed in an error message
TABLE = ("lpips", "ssim", "dino_l1")  # columns of the paper's Table 1


class Handle(NamedTuple):
    """One window: dataset directory, trajectory, first frame, and number of frames."""

    directory: str
    traj_id: int
    frame: int
    horizon: int

    @property
    def pieces(self) -> list[str]:
        """The parts of the directory path, whichever separator it uses."""
        return [piece for piece in re.split(r"[/\\]", self.directory) if piece]

    @property
    def iws(self) -> bool:
        """Whether it belongs to the interactive world simulator's data."""
        return is_iws(self.pieces)


def read_handles(path: Path) -> dict[int, list[Handle]]:
    """The handles of a file by horizon in frames, in file order.

    Raises FileNotFoundError, or ValueError naming the incomplete handles (at most the first eight).
    """
    if not path.is_file():
        raise FileNotFoundError(f"--handles: expected the release's evaluation handles (a JSON file), found no {path}")
    try:
        lists = json.loads(path.read_text())["handles_by_horizon"]
        entries = [(int(horizon), i, entry) for horizon, listed in lists.items() for i, entry in enumerate(listed)]
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f'{path}: expected {{"handles_by_horizon": {{"5": [handle, ...]}}}}, found '
            f"{type(error).__name__}: {' '.join(str(error).split())}; fetch it again"
        ) from None
    handles: dict[int, list[Handle]] = {}
    problems = []
    for horizon, index, entry in entries:
        try:
            handles.setdefault(horizon, []).append(_handle(entry, horizon))
        except ValueError as error:
            problems.append(f"horizon {horizon}, handle {index}: {error}")
    _refuse(path, problems)
    if not handles:
        raise ValueError(f"{path}: expected handles in handles_by_horizon, found none; fetch it again")
    return handles


def _handle(entry: Any, horizon: int) -> Handle:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object, found {type(entry).__name__}")
    if missing := [key for key in KEYS if key not in entry]:
        raise ValueError(f"expected {', '.join(KEYS)}, found no {', '.join(missing)}")
    number = re.fullmatch(r"(?:traj_)?(\d+)", str(entry["traj_id"]))
    frame = entry["frame_id"]
    if number is None:
        raise ValueError(f"traj_id: expected a number such as 000003, found {entry['traj_id']!r}")
    if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
        raise ValueError(f"frame_id: expected a frame's number, found {frame!r}")
    if entry["sampled_horizon"] != horizon or horizon < 2:
        raise ValueError(f"sampled_horizon: expected {horizon}, as its list says, found {entry['sampled_horizon']!r}")
    return Handle(str(entry["dataset_root"]), int(number[1]), frame, horizon)


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n".join(f"  {line}" for line in [*problems[:SHOWN], *more])
        raise ValueError(f"{path}: {len(problems)} handles cannot be used:\n{lines}")


def select(
    handles: Mapping[int, list[Handle]], path: Path, *, horizons: Sequence[int] | None, count: int | None
) -> dict[int, list[Handle]]:
    """The first `count` handles of each of `horizons` (default: all); ValueError for a horizon without handles."""
    if absent := sorted(set(horizons or ()) - set(handles)):
        there = ", ".join(map(str, sorted(handles)))
        raise ValueError(f"--horizons: expected horizons of {path} ({there}), found {', '.join(map(str, absent))}")
    return {horizon: chosen[:count] for horizon, chosen in handles.items() if horizons is None or horizon in horizons}


def use_datasets(config: ConfigDict, handles: Mapping[int, Sequence[Handle]], path: Path) -> None:
    """Set the config's data to the datasets of the handles, as built at the model's image size.

    Raises ValueError naming every directory that is not part of the release.
    """
    directories = {handle.directory: handle for listed in handles.values() for handle in listed}
    references = {name: dataset_of(handle, config) for name, handle in directories.items()}
    _refuse(
        path,
        [
            f"dataset_root: expected a folder of the release's tree (ppo/ROBOT/TASK/GROUP or an IWS task), found {name}"
            for name, reference in references.items()
            if reference is None
        ],
    )
    datasets = tuple(sorted({reference for reference in references.values() if reference}))
    group = {"datasets": datasets, "weight": 1.0, "min_start_frame": 0}
    with config.unlocked():
        config.data.groups = ConfigDict({"handles": group})


def dataset_of(handle: Handle, config: ConfigDict) -> str | None:
    """Our name for the dataset a handle points into; None for a folder outside the release's tree."""
    if not handle.pieces:
        return None
    name, split = dataset_and_split(handle.pieces)
    exact = f"{name}_{config.backbone.image_size}px"
    built = sorted(folder.name for folder in (Path(config.data.root) / name).parent.glob(f"{Path(exact).name}*"))
    # a build with only some episodes, or with JPEG frames, has a longer name
    chosen = f"{Path(name).parent}/{built[0]}" if len(built) == 1 else exact
    return f"{chosen}:{split}"


def handle_windows(
    handles: Mapping[int, Sequence[Handle]], loader: WindowLoader, config: ConfigDict, path: Path
) -> dict[int, list[Window]]:
    """The windows of the handles by horizon, in the same order; `loader` reads the datasets `use_datasets` chose.

    Raises ValueError naming the handles (at most the first eight) whose trajectory or frames are missing.
    """
    references = list(config.data.groups.handles.datasets)
    windows: dict[int, list[Window]] = {}
    problems = []
    for horizon, listed in handles.items():
        for index, handle in enumerate(listed):
            dataset = references.index(dataset_of(handle, config))
            store = loader.stores[references[dataset]]
            rows = np.flatnonzero(store.episode_ids == handle.traj_id)
            about = f"horizon {horizon}, handle {index}: {store.reference}, trajectory {handle.traj_id}"
            if not len(rows):
                problems.append(f"{about}: expected among its {len(store)} episodes, found none")
            elif handle.frame + horizon > store.lengths[rows[0]]:
                last, length = handle.frame + horizon - 1, store.lengths[rows[0]]
                problems.append(f"{about}: expected a frame {last}, found {length} frames")
            else:
                windows.setdefault(horizon, []).append(Window(0, dataset, int(rows[0]), handle.frame, horizon))
    _refuse(path, problems)
    return windows


def cut_of(protocol: str, config: ConfigDict, info: Mapping[str, Any], *, iws: bool) -> chunking.Chunking:
    """How a protocol ("release" | "exact") splits windows into predictions; `info` is the model's metadata.

    Models trained with an extra action row (config.data.last_action, the release's IWS runs) get it in exact mode too.
    """
    if protocol == "release":
        return chunking.release_iws if iws else chunking.release
    # conversions older than this field recorded it only in their report
    last_action = config.data.last_action or bool(info.get("converted", {}).get("last_action", False))
    return lambda horizon: chunking.exact(horizon, config.eval.chunk - 1, last_action=last_action)


def evaluate_handles(
    loop: OpenLoop, windows: Mapping[int, Sequence[Window]], *, progress: Progress = lambda n: None
) -> tuple[Evaluation, Result]:
    """The table by horizon, and all horizons pooled, with every handle counted once."""
    results, last = [], []
    for horizon, listed in sorted(windows.items()):
        pieces = loop.cut(horizon)
        errors = loop.measure(listed, images=loop.images, progress=progress)[-1]
        last.append(errors)
        rows = [piece.rows for piece in pieces]
        results.append(summarise(errors, episode_numbers(listed), pieces[-1].frame, rows, seed=loop.config.seed))
    episodes = episode_numbers([window for _, listed in sorted(windows.items()) for window in listed])
    pooled = summarise(_pool(last), episodes, results[-1].intervals, results[-1].chunks, seed=loop.config.seed)
    return Evaluation(settings(loop), results, []), pooled


def _pool(parts: Sequence[Errors]) -> Errors:
    """Errors of several horizons concatenated; a metric that a horizon lacks is NaN there."""
    rows = parts[0].keys()
    size = [len(next(iter(part[next(iter(rows))].values()))) for part in parts]
    names = {row: dict.fromkeys(name for part in parts for name in part[row]) for row in rows}
    return {
        row: {
            name: np.concatenate([part[row].get(name, np.full(n, np.nan)) for part, n in zip(parts, size, strict=True)])
            for name in names[row]
        }
        for row in rows
    }


def table_row(pooled: Result, protocol: str) -> str:
    """One row of the paper's Table 1 with its header: LPIPS, SSIM and DINO L1, as means over all handles."""
    metrics = pooled.rows[SINGLE].metrics
    cells = [f"{metrics[name].value:.3f}" if name in metrics else "-" for name in TABLE]
    return markdown.table(
        ("model", "LPIPS", "SSIM", "DINO L1", "handles", "protocol"),
        [("RLA-WM", *cells, str(pooled.windows), protocol)],
    )
