"""Readable closed-loop results: a Markdown table and one self-contained page with the videos."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlawm_jax import markdown
from rlawm_jax.evaluation.closed_loop import ClosedLoop, Comparison, ImaginedReturns, write_text
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.evaluation.statistics import DRAWS, Estimate
from rlawm_jax.reports.html import page

TABLE_FILE = "closed_loop.md"
PAGE_FILE = "closed_loop.html"
VIDEO_FOLDER = "videos"
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Text in rows: a heading and one cell per column."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]

    def markdown(self) -> str:
        """The table with its headings."""
        return markdown.table(["", *self.columns], [[name, *cells] for name, cells in self.rows])


def write_report(
    workdir: str | Path,
    result: ClosedLoop,
    comparison: Comparison | None = None,
    imagined: ImaginedReturns | None = None,
) -> Path:
    """Write the table and the page into a run folder, with the videos found there; returns the page."""
    workdir = Path(workdir)
    write_text(workdir / TABLE_FILE, format_markdown(result, comparison, imagined))
    videos = {seed: path.read_bytes() for seed in result.seeds if (path := video_path(workdir, seed)).is_file()}
    write_text(workdir / PAGE_FILE, render(result, comparison, imagined, videos=videos))
    return workdir / PAGE_FILE


def video_path(workdir: str | Path, seed: int) -> Path:
    """The path of a seed's recording."""
    return Path(workdir) / VIDEO_FOLDER / f"seed_{seed}.mp4"


def format_markdown(
    result: ClosedLoop, comparison: Comparison | None = None, imagined: ImaginedReturns | None = None
) -> str:
    """The tables, and the notes needed to interpret them."""
    parts = [f"# {title(result)}", in_words(result, comparison), scores(result, comparison).markdown(), caption(result)]
    if comparison:
        parts.append("\n".join(f"- {line}" for line in tests_in_words(result, comparison)))
    if imagined:
        table = imagined_against_true(result, comparison, imagined)
        parts += ["## Imagined against true", table.markdown(), imagined_caption(result, comparison, imagined)]
    return "\n\n".join(parts) + "\n"


def render(
    result: ClosedLoop,
    comparison: Comparison | None = None,
    imagined: ImaginedReturns | None = None,
    *,
    videos: Mapping[int, bytes],
) -> str:
    """The page as text; `videos` holds an MP4 by seed."""
    outcomes = {outcome.seed: outcome for outcome in result.outcomes}
    return page(
        "closed_loop.html",
        title=title(result),
        words=in_words(result, comparison),
        cards=cards(result, comparison),
        table=scores(result, comparison),
        caption=caption(result),
        tests=tests_in_words(result, comparison) if comparison else [],
        imagined=imagined_against_true(result, comparison, imagined) if imagined else None,
        imagined_caption=imagined_caption(result, comparison, imagined) if imagined else "",
        videos=[(outcomes[seed], base64.b64encode(video).decode()) for seed, video in videos.items()],
        task=result.settings["task"],
        facts=facts(result.settings),
    )


def title(result: ClosedLoop) -> str:
    """Which policy acts in which task."""
    return f"{result.settings['policy']} in {result.settings['task']['simulator']}"


def in_words(result: ClosedLoop, comparison: Comparison | None) -> str:
    """The main finding, claiming nothing that its interval does not support."""
    estimates, score = result.estimates(), result.settings["task"]["score"]
    successes = sum(outcome.success for outcome in result.outcomes)
    text = (
        f"{successes} of {len(result.outcomes)} episodes succeed; the best {score} of an episode is "
        f"{format_estimate(estimates['score_max'], 3)} on average."
    )
    if not comparison:
        return text
    verdicts = [
        f"{what} is {verdict(comparison.differences[name])}"
        for name, what in (("success", "success"), ("score_max", f"best {score}"))
    ]
    return f"{text} Against {comparison.other.settings['policy']} on the same seeds, {' and '.join(verdicts)}."


def verdict(difference: Estimate) -> str:
    """The conclusion that the interval of a paired difference supports."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not told apart"


def scores(result: ClosedLoop, comparison: Comparison | None) -> Table:
    """A row per measure: this policy and, in a comparison, the other one and the paired difference."""
    columns = [result.settings["policy"]]
    estimates, others = [result.estimates()], {}
    if comparison:
        columns += [comparison.other.settings["policy"], "difference"]
        estimates.append(comparison.other.estimates())
        others = comparison.differences
    rows = []
    for name in estimates[0]:
        cells = [format_estimate(values[name], 3) for values in estimates]
        rows.append((label(name, result.settings["task"]), cells + ([signed(others[name])] if comparison else [])))
    return Table(columns, rows)


def imagined_against_true(result: ClosedLoop, comparison: Comparison | None, imagined: ImaginedReturns) -> Table:
    """The world model's predicted returns beside the simulator's results; true values before need a comparison."""
    returns = imagined.estimates()
    cells = [format_estimate(returns[name], 3) for name in ("before", "after")]
    rows = [("imagined return", [*cells, signed(returns["difference"])])]
    for name, estimate in result.estimates().items():
        before, difference = NONE, NONE
        if comparison:
            before = format_estimate(comparison.other.estimates()[name], 3)
            difference = signed(comparison.differences[name])
        rows.append(
            (f"true {label(name, result.settings['task'])}", [before, format_estimate(estimate, 3), difference])
        )
    return Table(["before", "after", "difference"], rows)


def imagined_caption(result: ClosedLoop, comparison: Comparison | None, imagined: ImaginedReturns) -> str:
    """How the rows of the second table were obtained."""
    before = comparison.other.settings["policy"] if comparison else "not evaluated (add --against)"
    return (
        f"Before: {before}; after: {result.settings['policy']}. Imagined return: {len(imagined.after)} episodes in the "
        f"world model from the same frames of {len(set(imagined.episodes))} recordings before and after, mean actions; "
        "the interval is a bootstrap over recordings."
    )


def tests_in_words(result: ClosedLoop, comparison: Comparison) -> list[str]:
    """The exact tests of the shares, a sentence each."""
    return [
        f"{label(name, result.settings['task'])}: {test.only_first} seeds by the first policy alone, "
        f"{test.only_second} by the second alone; McNemar's exact p = {test.p_value:.2g}."
        for name, test in comparison.tests.items()
    ]


def label(name: str, task: Mapping[str, Any]) -> str:
    """The name of a measure."""
    score = task["score"]
    if name == "success":
        return f"success ({score} > {task['success_above']:g})"
    if name.startswith("reached_"):
        return f"{score} {name.removeprefix('reached_')} reached"
    return {"score_max": f"{score}, best of the episode", "score_final": f"{score}, at the end"}[name]


def caption(result: ClosedLoop) -> str:
    """What a reader needs to know to interpret the table."""
    task, settings = result.settings["task"], result.settings
    return (
        f"{len(result.outcomes)} episodes, seeds {result.seeds[0]} to {result.seeds[-1]}: {task['starts']}. At most "
        f"{task['max_steps']} steps at {task['control_hz']:g} Hz, {settings['rows']} of them per observation; an "
        f"episode ends when it succeeds. Mean and 95 % interval: Wilson's for shares, a bootstrap over episodes "
        f"({DRAWS} draws) for scores and for paired differences (first minus second on the same seeds)."
    )


def cards(result: ClosedLoop, comparison: Comparison | None) -> list[dict[str, str]]:
    """Success and best score as big numbers, and the paired differences."""
    task, estimates = result.settings["task"], result.estimates()
    shown = [(estimates[name], label(name, task), result.settings["policy"]) for name in ("success", "score_max")]
    if comparison:
        against = f"difference to {comparison.other.settings['policy']}"
        shown += [(comparison.differences[n], label(n, task), against) for n in ("success", "score_max")]
    return [
        {
            "value": f"{estimate.value:+.2f}" if detail.startswith("difference") else f"{estimate.value:.2f}",
            "interval": f"{estimate.low:.2f} to {estimate.high:.2f}",
            "label": name,
            "detail": detail,
            "row": "ceiling" if detail.startswith("difference") else "mean",
        }
        for estimate, name, detail in shown
    ]


def facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a reader needs to rerun the evaluation, as text."""
    versions = settings["task"]["versions"]
    shown = {"Simulator": ", ".join([settings["task"]["simulator"], *(f"{k} {v}" for k, v in versions.items())])}
    names = {"image_size": "Frame side in pixels", "step": "Checkpoint", "command": "Command"}
    return shown | {text: str(settings[key]) for key, text in names.items() if key in settings}


def signed(estimate: Estimate) -> str:
    """A difference with its sign."""
    text = format_estimate(estimate, 3)
    return text if text.startswith("-") else f"+{text}"
