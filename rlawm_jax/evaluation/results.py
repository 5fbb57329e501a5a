"""Evaluation results, as data, as JSON and as a text table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate

SINGLE, MEAN, COPY, CEILING = "single", "mean", "copy", "ceiling"
RANDOM_SINGLE, RANDOM_MEAN = "random_single", "random_mean"
ROWS = (SINGLE, MEAN, RANDOM_SINGLE, RANDOM_MEAN, COPY, CEILING)


@dataclass(frozen=True)
class Metric:
    """How a metric is shown; `ratio` says whether its ratio to copy-last-frame is meaningful."""

    label: str
    better: str  # "lower" | "higher"
    digits: int
    ratio: bool


METRICS = {
    "dino_l1": Metric("DINO L1", "lower", 3, True),
    "dino_l1_changed": Metric("DINO L1, changed", "lower", 3, True),
    "latent_l1": Metric("latent L1", "lower", 3, False),
    "psnr": Metric("PSNR", "higher", 2, False),
    "ssim": Metric("SSIM", "higher", 3, False),
    "lpips": Metric("LPIPS", "lower", 3, True),
}

Errors = Mapping[str, Mapping[str, np.ndarray]]  # row -> metric -> [windows], NaN where a window has no value


@dataclass(frozen=True)
class Row:
    """One predictor: its estimates by metric, and their ratios to copy-last-frame on the same windows."""

    metrics: dict[str, Estimate]
    ratios: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """All predictors `intervals` steps after the first frame, reached in predictions of `chunks` action rows."""

    intervals: int
    chunks: list[int]
    windows: int
    episodes: int
    rows: dict[str, Row]

    @property
    def frames(self) -> int:
        """The horizon in frames, as counted by the paper and the configs."""
        return self.intervals + 1


@dataclass(frozen=True)
class Evaluation:
    """A table (one result per horizon), a curve (results on the longest horizon's windows), and the settings used."""

    settings: dict[str, Any]
    table: list[Result]
    curve: list[Result]

    def to_json(self) -> dict[str, Any]:
        """Plain data for metrics.json.

        {"settings": {...}, "table": [result], "curve": [result]} with result = {"intervals", "chunks", "windows",
        "episodes", "rows": {row: {"metrics": {metric: estimate}, "ratios": {metric: estimate}}}}, row in `ROWS` and
        estimate = {"value", "low", "high", "count", "clusters"} (95 % interval over episodes; null where undefined). A
        metric that a row does not have is absent.
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
    rows = {}
    for row, by_metric in ((row, errors[row]) for row in ROWS):
        metrics = {name: bootstrap.mean(values) for name, values in by_metric.items()}
        ratios = {
            name: bootstrap.ratio(values, errors[COPY][name])
            for name, values in by_metric.items()
            if METRICS[name].ratio and row != COPY
        }
        rows[row] = Row(*({k: v for k, v in found.items() if v is not None} for found in (metrics, ratios)))
    return Result(intervals, list(chunks), len(episodes), len(np.unique(episodes)), rows)


def row_label(row: str, settings: Mapping[str, Any]) -> str:
    """A readable name for a row."""
    return {
        SINGLE: "model, single sample",
        MEAN: f"model, mean of {settings['samples']}",
        RANDOM_SINGLE: "random latent, single sample",
        RANDOM_MEAN: f"random latent, mean of {settings['samples']}",
        COPY: "copy last frame",
        CEILING: "RLA reconstruction",
    }[row]


def caption(settings: Mapping[str, Any]) -> str:
    """What a reader needs to know to interpret the table."""
    return (
        "Held-out episodes. Mean and 95 % interval; windows of one episode are not independent, so the interval is a "
        f"bootstrap over episodes ({settings['bootstrap_draws']} draws). Changed: patches whose token moves by more "
        f"than {settings['changed_threshold']:g} (mean absolute) between first and last frame; windows without one "
        "are left out of that column. Ratio: to copy-last-frame on the same windows, paired. Single sample: expected "
        "error of one draw (image metrics: of the first). RLA reconstruction: the decoder given the true pair's "
        "latent. Random latent: the decoder given plain noise, which is what its blur alone earns. Image metrics "
        "compare decoded tokens with the true frame."
    )


def format_result(result: Result, settings: Mapping[str, Any]) -> str:
    """One horizon as aligned text, values with their intervals."""
    names = [name for name in METRICS if any(name in row.metrics for row in result.rows.values())]
    header = ["", *(METRICS[name].label for name in names)]
    header += [f"{METRICS[name].label} / copy" for name in names if METRICS[name].ratio]
    lines = [header]
    for row, found in result.rows.items():
        cells = [format_estimate(found.metrics.get(name), METRICS[name].digits) for name in names]
        cells += [format_estimate(found.ratios.get(name), 2) for name in names if METRICS[name].ratio]
        lines.append([row_label(row, settings), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([headline(result), *text])


def headline(result: Result) -> str:
    """Horizon, chunks and counts in words."""
    chunks = "one prediction" if len(result.chunks) == 1 else f"{len(result.chunks)} predictions"
    changed = result.rows[COPY].metrics.get("dino_l1_changed")
    return (
        f"h = {result.frames} frames ({result.intervals} intervals, {chunks}), {result.windows} windows of "
        f"{result.episodes} episodes, {changed.count if changed else 0} of them with changed patches"
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
