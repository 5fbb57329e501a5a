"""One self-contained HTML page about a run: its results, the images behind them, and how they were made."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlawm_jax.evaluation import results
from rlawm_jax.evaluation.motion import LATENTS, NOISE, TOKENS, TRUE
from rlawm_jax.evaluation.results import ANOTHERS, CEILING, COPY, MEAN, METRICS, SINGLE, Evaluation, Result
from rlawm_jax.evaluation.statistics import Estimate
from rlawm_jax.reports import plots
from rlawm_jax.reports.film_strips import HALFWAY_DRAWS, Film, Gallery
from rlawm_jax.reports.html import page

STRIP_FRAMES = 8
GIF_FILMS = 4

STRIP_ROWS = {
    "truth": ("True frame", ""),
    "decoded": ("True tokens, decoded", "the image decoder's own limit"),
    "prediction": ("Prediction", "one draw, from the first frame and the actions"),
    "reconstruction": ("RLA reconstruction", "the true pair through the latent"),
    "copy": ("Copy last frame", "the last frame that was seen"),
}
MOTION_NAMES = {
    NOISE: "noise to the window's latent, single draws",
    LATENTS: "latent of the first step to the window's latent",
    TOKENS: "first tokens to last tokens",
    TRUE: "no path: the latent of each true frame",
}
HALFWAY_NAMES = {
    "mean": f"half-way latent, mean of {HALFWAY_DRAWS} draws",
    "single": "half-way latent, one draw",
    "blend": "average of first and last tokens",
    "first": "first frame",
    "last": "last frame",
}


def write_report(
    directory: str | Path,
    evaluation: Evaluation,
    gallery: Gallery,
    *,
    history: plots.History,
    provenance: Mapping[str, Any],
) -> Path:
    """Write `directory`/index.html (needs no other file) and, where there are films, rollout.gif; returns the page."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    animation = animate(gallery.films)
    if animation:
        (directory / "rollout.gif").write_bytes(animation)
    page = directory / "index.html"
    page.write_text(render(evaluation, gallery, animation, history=history, provenance=provenance), encoding="utf-8")
    return page


def render(
    evaluation: Evaluation,
    gallery: Gallery,
    animation: bytes,
    *,
    history: plots.History,
    provenance: Mapping[str, Any],
) -> str:
    """The page as text."""
    settings = evaluation.settings
    return page(
        "report.html",
        words=in_words(evaluation),
        cards=cards(evaluation),
        legend={row: results.row_label(row, settings) for row in plots.STYLES},
        tables=[table(result, settings) for result in evaluation.table],
        caption=results.caption(settings),
        curve=plots.horizon_curve(evaluation.curve),
        animation=base64.b64encode(animation).decode(),
        films=[strip(film) for film in gallery.films],
        gif_films=min(GIF_FILMS, len(gallery.films)),
        maps=[feature_maps(maps, settings) for maps in gallery.maps],
        halfway=gallery.halfway,
        halfway_errors={HALFWAY_NAMES[name]: estimate for name, estimate in gallery.halfway_errors.items()},
        format=results.format_estimate,
        pool=gallery.pool,
        motion=evaluation.motion,
        motion_chart=plots.motion_curve(evaluation.motion) if evaluation.motion else "",
        paths={path: (MOTION_NAMES[path], row) for path, row in plots.MOTION_ROWS.items()},
        training=plots.training_curves(history),
        provenance=facts(provenance),
        config=json.dumps(json.loads(provenance["config"]), indent=2),
    )


def animate(films: list[Film]) -> bytes:
    """GIF of the first films, ground truth above prediction; empty without films."""
    chosen = [(film.rows["truth"], film.rows["prediction"]) for film in films[:GIF_FILMS]]
    return plots.gif(chosen) if chosen else b""


def verdict(ratio: Estimate) -> str:
    """The conclusion that the interval of a ratio to copy-last-frame supports."""
    if ratio.high < 1:
        return "better than copying the last frame"
    if ratio.low > 1:
        return "worse than copying the last frame"
    return "not told apart from copying the last frame"


def in_words(evaluation: Evaluation) -> list[str]:
    """The main findings, a sentence or two per horizon, claiming nothing that the interval does not support."""
    sentences = []
    for result in evaluation.table:
        everywhere, moving = (result.rows[MEAN].ratios.get(name) for name in ("dino_l1", "dino_l1_moving"))
        if everywhere is None:
            continue
        rolled = "" if len(result.chunks) == 1 else f" in {len(result.chunks)} chained predictions"
        near = f" and {verdict(moving)} near what moves ({results.format_estimate(moving, 2)})" if moving else ""
        sentences.append(
            f"{result.intervals} steps ahead{rolled}, the mean of {evaluation.settings['samples']} draws is "
            f"{verdict(everywhere)} on all patches ({results.format_estimate(everywhere, 2)} of its error){near}. "
            f"{actions_in_words(result)}"
        )
    return sentences


def actions_in_words(result: Result) -> str:
    """Whether the model uses its actions, as far as the interval of own minus another's supports it."""
    metric = "dino_l1_moving" if "dino_l1_moving" in result.own_minus_anothers.ratios else "dino_l1"
    paired = result.own_minus_anothers.ratios.get(metric)
    if paired is None:
        return ""
    where = "near what moves" if metric == "dino_l1_moving" else "on all patches"
    difference = f"own minus another's {results.format_estimate(paired, 3)} of copying's error {where}"
    if paired.high < 0:
        return f"It uses its actions: {difference}."
    if paired.low > 0:
        return f"Its own actions make it worse than another window's: {difference}."
    return f"That it uses its actions is not shown: {difference}."


def cards(evaluation: Evaluation) -> list[dict[str, str]]:
    """The shortest horizon's shares of copying's error as big numbers: all patches first, moving ones where known."""
    result = evaluation.table[0]
    steps = f"{result.intervals} steps ahead"
    moving = ("dino_l1_moving", "moving patches") if "dino_l1_moving" in result.rows[COPY].metrics else None
    everywhere = ("dino_l1", "all patches")
    wanted = [(MEAN, *everywhere)]
    wanted += [(MEAN, *moving)] if moving else [(SINGLE, *everywhere)]
    wanted += [(ANOTHERS, *(moving or everywhere)), (CEILING, *(moving or everywhere))]
    return [
        {
            "value": f"{ratio.value:.2f}",
            "interval": "" if np.isnan(ratio.low) else f"{ratio.low:.2f} to {ratio.high:.2f}",
            "label": results.row_label(row, evaluation.settings),
            "detail": f"{where}, {steps}",
            "row": row,
        }
        for row, metric, where in wanted
        if row in result.rows and (ratio := result.rows[row].ratios.get(metric))
    ]


def table(result: Result, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One horizon's table: headings and cells as text."""
    names = [name for name in METRICS if any(name in row.metrics for row in result.rows.values())]
    ratios = [name for name in names if METRICS[name].ratio]
    rows = []
    for row, estimates in result.rows.items():
        cells = [cell(estimates.metrics.get(name), METRICS[name].digits) for name in names]
        cells += [cell(estimates.ratios.get(name), 2) for name in ratios]
        rows.append({"name": row, "label": results.row_label(row, settings), "cells": cells})
    arrows = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}
    return {
        "title": f"{result.intervals} steps ahead",
        "detail": results.headline(result),
        "heads": [f"{METRICS[name].label} {arrows[METRICS[name].better]}" for name in names],
        "ratio_heads": [METRICS[name].label for name in ratios],
        "rows": rows,
        "actions": [
            words for name in ("dino_l1", "dino_l1_moving") if (words := results.own_or_anothers(result, name))
        ],
    }


def cell(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """(value, interval) as text; empty where there is none."""
    if estimate is None:
        return "", ""
    value, _, interval = results.format_estimate(estimate, digits).partition(" ")
    return value, interval.strip("[]").replace(", ", "\N{EN DASH}")


def strip(film: Film) -> dict[str, Any]:
    """Some frames of a film, one line per row of `STRIP_ROWS`."""
    times = strip_times(film.ends)
    heads = [("seen" if t == 0 else f"+{t}", t in film.ends) for t in times]
    lines = [(*text, [film.rows[name][t] for t in times]) for name, text in STRIP_ROWS.items()]
    return {"label": film.label, "heads": heads, "lines": lines}


def strip_times(ends: list[int]) -> list[int]:
    """The first frame and at most `STRIP_FRAMES` more, evenly over the chunks, with as many chunk ends as fit."""
    parts = max(1, STRIP_FRAMES // len(ends))
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    times = sorted({round(a + (b - a) * (i + 1) / parts) for a, b in spans for i in range(parts)} - {0})
    kept = np.linspace(0, len(times) - 1, min(STRIP_FRAMES, len(times))).round().astype(int)
    return [0, *(times[i] for i in kept)]


def feature_maps(maps: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of one window's tokens: frames, components, errors on one scale."""
    top = float(max(error.max() for error in maps.errors.values()))
    mean = results.row_label(MEAN, settings)
    shown = [("first frame seen", plots.jpeg(maps.frames["first"]), False)] if maps.frames else []
    shown += [("true last frame", plots.jpeg(maps.frames["truth"]), False)] if maps.frames else []
    names = {"first": "tokens, first", "truth": "tokens, true last", "mean": f"tokens, {mean}"}
    names["single"] = f"tokens, {results.row_label(SINGLE, settings)}"
    shown += [(text, plots.png(maps.components[name]), True) for name, text in names.items()]
    errors = {COPY: "error, copy last frame", MEAN: f"error, {mean}"}
    shown += [(text, plots.png(plots.heat(maps.errors[name], top)), True) for name, text in errors.items()]
    return {"label": maps.label, "figures": shown, "top": f"{top:.2f}"}


def facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What a reader needs to repeat the run, as text; the config is shown separately."""
    shown = {"Command": "command", "Evaluated by": "evaluated_by", "Git revision": "git", "Step": "step"}
    shown |= {"Machine": "machine", "Backbone": "backbone", "Backbone fingerprint": "fingerprint"}
    shown |= {"Trained parts": "trained_parts", "Data": "data", "Versions": "versions"}
    known = {label: provenance[key] for label, key in shown.items() if key in provenance}
    return {label: _as_text(value) for label, value in known.items()}


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_history(path: str | Path) -> list[dict[str, float | None]]:
    """The lines of a run's metrics.jsonl; none where the file is missing."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
