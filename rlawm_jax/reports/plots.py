"""The report's plots: curves as inline SVG that takes its colours from the page, images as data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from rlawm_jax.evaluation.motion import FIRST, LATENTS, NOISE, TOKENS, TRUE
from rlawm_jax.evaluation.results import ANOTHERS, CEILING, COPY, MEAN, RANDOM_MEAN, SINGLE, Motion, Result
from rlawm_jax.evaluation.statistics import Estimate

# colours that matplotlib writes and the page replaces, so that one plot suits both a light and a dark page
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = {MEAN: "#050505", SINGLE: "#060606", COPY: "#070707", CEILING: "#080808", RANDOM_MEAN: "#090909"}
COLOURS |= {ANOTHERS: "#090102"}
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--{row}" for row, colour in COLOURS.items()
}
# the rows shown in the curve
STYLES = {MEAN: "-", SINGLE: "-", ANOTHERS: "--", RANDOM_MEAN: "--", COPY: "--", CEILING: ":"}
MOTION_ROWS = {NOISE: MEAN, LATENTS: SINGLE, TOKENS: COPY, TRUE: CEILING}  # whose colours the paths have
GIF_GAP = 1  # pixels around each image
SMOOTHING = 0.8  # per logged point, for the training curves' thick line

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlawm",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}

COPIED = "grey: copy last frame"
# for each part, from its logged metrics: title, the curve drawn, its reference, and what that is
TRAINING_CURVES = {
    "rla": ("RLA: DINO L1 of the reconstruction", "l1", "copy_l1", COPIED),
    "denoiser": ("Denoiser: L1 of the velocity", "l1", None, ""),
    "image_decoder": ("Image decoder: L1 of the frame", "l1", None, ""),
    "val": ("Held out: share of copying's error", "own_over_copy", "anothers_over_copy", "grey: another's actions"),
}

History = Sequence[Mapping[str, float | None]]
Series = tuple[list[float], list[float]]  # steps, values


def horizon_curve(curve: Sequence[Result]) -> str:
    """SVG of DINO L1 over the number of steps predicted, with 95 % bands: all patches, and relative to copying.

    The second panel is of the moving patches where they are known.
    """
    moving = any("dino_l1_moving" in result.rows[COPY].metrics for result in curve)
    where, metric = ("moving", "dino_l1_moving") if moving else ("all", "dino_l1")
    panels = (
        ("DINO L1, all patches", lambda row: row.metrics.get("dino_l1")),
        (f"DINO L1, {where} patches, as a share of copy last frame", lambda row: row.ratios.get(metric)),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.7), layout="constrained")
        for axes, (title, pick) in zip(figure.subplots(1, 2), panels, strict=True):
            for end in np.cumsum(curve[-1].chunks):
                axes.axvline(end, color=LINE, linewidth=0.8, zorder=0)
            for row in reversed(STYLES):
                _draw_band(axes, [(r.intervals, e) for r in curve if row in r.rows and (e := pick(r.rows[row]))], row)
            axes.set_title(title)
            axes.set_xlabel("steps after the first frame")
            axes.set_xlim(left=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].set_ylim(bottom=0)
        figure.axes[1].axhline(1, color=COLOURS[COPY], linestyle=STYLES[COPY])
        return _svg(figure)


def motion_curve(motion: Motion) -> str:
    """SVG of the mean position in time along each path, with 95 % bands, against linear time."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.7), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, motion.intervals], [0, 1], color=LINE)
        for path, row in MOTION_ROWS.items():
            _draw_band(axes, list(enumerate(motion.positions[path], start=FIRST[path])), row)
        axes.set_title("nearest true frame, as a share of the window")
        axes.set_xlabel("frame that linear time would reach")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def _draw_band(axes: Axes, points: Sequence[tuple[int, Estimate]], row: str) -> None:
    if not points:
        return
    steps, estimates = zip(*points, strict=True)
    low, high = [e.low for e in estimates], [e.high for e in estimates]
    axes.fill_between(steps, low, high, color=COLOURS[row], alpha=0.13, linewidth=0)
    marks = {"marker": "o", "markersize": 4.5, "markeredgecolor": PAPER, "markeredgewidth": 1}
    axes.plot(steps, [e.value for e in estimates], STYLES[row], color=COLOURS[row], **marks)


def training_curves(history: History) -> str:
    """SVG with one panel per trained part; empty where the history has none."""
    panels = {part: spec for part, spec in TRAINING_CURVES.items() if _series(history, f"{part}/{spec[1]}")[0]}
    if not panels:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (part, (title, name, reference, what)) in zip(axes, panels.items(), strict=True):
            _draw_training(panel, _series(history, f"{part}/{name}"), _series(history, f"{part}/{reference}"), what)
            panel.set_title(title)
            panel.set_xlabel("step")
        return _svg(figure)


def _draw_training(axes: Axes, own: Series, reference: Series, what: str) -> None:
    for (steps, values), colour in ((reference, COLOURS[COPY]), (own, COLOURS[MEAN])):
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smooth(values), color=colour)
    # the first steps are so far off the scale that the rest would look flat
    shown = [*reference[1], *own[1][len(own[1]) // 10 :]]
    bottom, top = min(shown), max(shown)
    axes.set_ylim(max(0.0, bottom - 0.1 * (top - bottom)), top + 0.1 * (top - bottom))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if reference[0]:
        label = {"ha": "right", "va": "top", "color": COLOURS[COPY], "transform": axes.transAxes}
        axes.text(1, 1, what, **label)


def _series(history: History, name: str) -> Series:
    """Steps and values of a metric; an inactive objective logs zeros, which are left out."""
    points = [(step, value) for line in history if (value := line.get(name)) and (step := line["step"])]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return smooth


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    width, height = (figure.get_size_inches() * 72).round(2)
    head = f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg" ' + (
        'xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    )
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f"{head}>{body}"


def jpeg(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """A photograph as a data URI."""
    return _uri(Image.fromarray(image), "JPEG", quality=90, subsampling=0)


def png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """A small image as a data URI, lossless."""
    return _uri(Image.fromarray(image), "PNG")


def _uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values: Float[np.ndarray, "i j"], top: float) -> UInt8[np.ndarray, "i j 3"]:
    """A map of errors between 0 and `top` as colours."""
    coloured = mpl.colormaps["magma"](np.clip(values / max(top, 1e-9), 0, 1))
    return (255 * coloured[..., :3]).astype(np.uint8)


def gif(columns: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]], *, per_second: float = 8) -> bytes:
    """An animation: each column shows one film above another, all of the same length; it pauses on the last frame."""
    frames = []
    for t in range(len(columns[0][0])):
        parts = [np.concatenate([_framed(above[t]), _framed(below[t])], axis=0) for above, below in columns]
        frames.append(Image.fromarray(np.concatenate(parts, axis=1)).quantize(128, dither=Image.Dither.NONE))
    buffer = io.BytesIO()
    durations = [int(1000 / per_second)] * (len(frames) - 1) + [1500]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _framed(image: np.ndarray) -> np.ndarray:
    # doubled, because thumbnails are small; a grey that suits both a light and a dark page
    large = image.repeat(2, axis=0).repeat(2, axis=1)
    return np.pad(large, ((GIF_GAP, GIF_GAP), (GIF_GAP, GIF_GAP), (0, 0)), constant_values=128)
