"""Evaluation results, as data, as JSON and as a text table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate

SINGLE, MEAN, COPY, CEILING = "single", "mean", "copy", "ceiling"
ANOTHERS, STILL = "anothers", "still"
RANDOM_SINGLE, RANDOM_MEAN, MEAN_LATENT = "random_single", "random_mean", "mean_latent"
ROWS = (SINGLE, MEAN, ANOTHERS, STILL, RANDOM_SINGLE, RANDOM_MEAN, MEAN_LATENT, COPY, CEILING)


@dataclass(frozen=True)
class Metric:
    """How a metric is shown; `ratio` is the row that its ratios are to ("" where a ratio means nothing)."""

    label: str
    better: str  # "lower" | "higher"
    digits: int
    ratio: str


METRICS = {
    "dino_l1": Metric("DINO L1", "lower", 3, COPY),
    "dino_l1_moving": Metric("DINO L1, moving", "lower", 3, COPY),
    "dino_l1_changed": Metric("DINO L1, changed", "lower", 3, COPY),
    "latent_l1": Metric("latent L1", "lower", 3, MEAN_LATENT),
    "psnr": Metric("PSNR", "higher", 2, ""),
    "ssim": Metric("SSIM", "higher", 3, ""),
    "lpips": Metric("LPIPS", "lower", 3, COPY),
}

Errors = Mapping[str, Mapping[str, np.ndarray]]  # row -> metric -> [windows], NaN where a window has no value


@dataclass(frozen=True)
class Row:
    """One predictor: its estimates by metric, and their ratios to another row's (`Metric.ratio`) on these windows."""

    metrics: dict[str, Estimate]
    ratios: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """All predictors `intervals` steps after the first frame, reached in predictions of `chunks` action rows.

    `own_minus_anothers` is how much the error of the mean of the draws falls with the windows' own actions in place of
    another window's (negative: own actions are better), paired by window, and in shares of what `Row.ratios` are of.
    """

    intervals: int
    chunks: list[int]
    windows: int
    episodes: int
    rows: dict[str, Row]
    own_minus_anothers: Row

    @property
    def frames(self) -> int:
        """The horizon in frames, as counted by the paper and the configs."""
        return self.intervals + 1


@dataclass(frozen=True)
class Motion:
    """Position in time along paths to the last frame of windows of `intervals` (evaluation/motion.py).

    scores: path -> "monotone", "correlation", "error" -> estimate; positions: path -> the mean at each point, as a
    share of the window.
    """

    intervals: int
    scores: dict[str, dict[str, Estimate]]
    positions: dict[str, list[Estimate]]


@dataclass(frozen=True)
class Evaluation:
    """A table (a result per horizon), a curve (on the longest horizon's windows), motion in time, the settings used."""

    settings: dict[str, Any]
    table: list[Result]
    curve: list[Result]
    motion: Motion | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for metrics.json.

        {"settings": {...}, "table": [result], "curve": [result], "motion": motion or null} with result = {"intervals",
        "chunks", "windows", "episodes", "rows": {name: row}, "own_minus_anothers": row}, name in `ROWS`, row =
        {"metrics": {metric: estimate}, "ratios": {metric: estimate}}, motion the fields of `Motion`, and estimate =
        {"value", "low", "high", "count", "clusters"} (95 % interval over episodes; null where undefined). A row without
        any value and a metric that a row does not have are absent.
        """
        return _without_nan(dataclasses.asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarise(errors: Errors, episodes: np.ndarray, intervals: int, chunks: Sequence[int], *, seed: int) -> Result:
    """Estimates from per-window errors; `episodes` [windows] identifies windows that share an episode."""
    bootstrap = ClusterBootstrap(episodes, seed=seed)

    def row(by_metric: Mapping[str, np.ndarray], name: str = "") -> Row:
        metrics = {metric: bootstrap.mean(values) for metric, values in by_metric.items()}
        ratios = {
            metric: bootstrap.ratio(values, errors[baseline][metric])
            for metric, values in by_metric.items()
            if (baseline := METRICS[metric].ratio) and baseline != name
        }
        return Row(*({k: v for k, v in estimates.items() if v is not None} for estimates in (metrics, ratios)))

    rows = {name: row(errors[name], name) for name in ROWS}
    own, anothers = errors[MEAN], errors[ANOTHERS]
    difference = row({metric: own[metric] - anothers[metric] for metric in own if metric in anothers})
    kept = {name: measured for name, measured in rows.items() if measured.metrics}
    return Result(intervals, list(chunks), len(episodes), len(np.unique(episodes)), kept, difference)


def row_label(row: str, settings: Mapping[str, Any]) -> str:
    """A readable name for a row."""
    mean = f"mean of {settings['samples']}"
    return {
        SINGLE: "model, single sample",
        MEAN: f"model, {mean}",
        ANOTHERS: f"another window's actions, {mean}",
        STILL: f"holding still, {mean}",
        RANDOM_SINGLE: "random latent, single sample",
        RANDOM_MEAN: f"random latent, {mean}",
        MEAN_LATENT: "mean latent",
        COPY: "copy last frame",
        CEILING: "RLA reconstruction",
    }[row]


def caption(settings: Mapping[str, Any]) -> str:
    """What a reader needs to know to interpret the table."""
    return (
        "Held-out episodes. Mean and 95 % interval; windows of one episode are not independent, so the interval is a "
        f"bootstrap over episodes ({settings['bootstrap_draws']} draws). Moving: patches near the effector or an "
        "object at the first or last frame, by the recorded positions, where the dataset says how they project. "
        f"Changed: patches whose token moves by more than {settings['changed_threshold']:g} (mean absolute) between "
        "first and last frame, which is to choose them by copy's own error: there any blur beats copying. Windows "
        "without such a patch are left out of that column. Ratio: to copy-last-frame on the same windows, paired; of "
        "the latent L1, to the mean latent. Single sample: expected error of one draw (image metrics: of the first). "
        "Another window's actions: of the same horizon and robot, from the same first frame and noise; a model that "
        "ignores its actions loses nothing by them. Holding still: actions that leave the robot where it is, where the "
        "dataset says which. "
        "Random latent: the decoder given plain noise, which is what its blur alone earns. Mean latent: the decoder "
        "given the mean of the true latents of these windows. RLA reconstruction: the decoder given the true pair's "
        "latent. Image metrics compare decoded tokens with the true frame."
    )


def own_or_anothers(result: Result, metric: str) -> str:
    """Whether the model's own actions help it, in words; "" where there is nothing to compare."""
    share, error = (
        estimates.get(metric) for estimates in (result.own_minus_anothers.ratios, result.own_minus_anothers.metrics)
    )
    if share is None or error is None:
        return ""
    # NaN, of a single episode, is not told apart
    verdict = "lower than" if error.high < 0 else "higher than" if error.low > 0 else "not told apart from that"
    return (
        f"{METRICS[metric].label}: error {verdict} with another window's actions: own minus another's "
        f"{format_estimate(error, 4)}, {format_estimate(share, 3)} of copying"
    )


def format_result(result: Result, settings: Mapping[str, Any]) -> str:
    """One horizon as aligned text, values with their intervals."""
    names = [name for name in METRICS if any(name in row.metrics for row in result.rows.values())]
    header = ["", *(METRICS[name].label for name in names)]
    header += [
        f"{METRICS[name].label} / {METRICS[name].ratio.replace('_', ' ')}" for name in names if METRICS[name].ratio
    ]
    lines = [header]
    for row, estimates in result.rows.items():
        cells = [format_estimate(estimates.metrics.get(name), METRICS[name].digits) for name in names]
        cells += [format_estimate(estimates.ratios.get(name), 2) for name in names if METRICS[name].ratio]
        lines.append([row_label(row, settings), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    compared = [words for metric in ("dino_l1", "dino_l1_moving") if (words := own_or_anothers(result, metric))]
    return "\n".join([headline(result), *text, *compared])


def headline(result: Result) -> str:
    """Horizon, chunks and counts in words."""
    chunks = "one prediction" if len(result.chunks) == 1 else f"{len(result.chunks)} predictions"
    copy = result.rows[COPY].metrics
    moving = f", {copy['dino_l1_moving'].count} of them with moving patches" if "dino_l1_moving" in copy else ""
    changed = copy["dino_l1_changed"].count if "dino_l1_changed" in copy else 0
    return (
        f"h = {result.frames} frames ({result.intervals} intervals, {chunks}), {result.windows} windows of "
        f"{result.episodes} episodes{moving}, {changed} of them with changed patches"
    )


def format_estimate(estimate: Estimate | None, digits: int) -> str:
    """`0.123 [0.110, 0.140]`; a dash where there is none."""
    if estimate is None:
        return "-"
    value = f"{estimate.value:.{digits}f}"
    return value if math.isnan(estimate.low) else f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def format_table(evaluation: Evaluation) -> str:
    """All horizons as text, with the caption."""
    blocks = [format_result(result, evaluation.settings) for result in evaluation.table]
    return "\n\n".join([*blocks, caption(evaluation.settings)])
