"""Closed-loop evaluation: how well a policy does in a real simulator from fixed seeds, alone or against another.

Per-seed outcomes are kept (`closed_loop.json`), so that two policies can be compared without rerunning either.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate, McNemar, mcnemar, wilson
from rlawm_jax.sim.protocol import Task
from rlawm_jax.sim.rollout import Episode

RESULTS_FILE = "closed_loop.json"
IMAGINED_FILE = "imagined_returns.json"
BOOTSTRAP_SEED = 2026


@dataclass(frozen=True)
class EpisodeOutcome:
    """The result of one seed; scores are the task's: the best over all steps and the one after the last step."""

    seed: int
    success: bool
    score_max: float
    score_final: float
    steps: int

    @classmethod
    def of(cls, episode: Episode) -> "EpisodeOutcome":
        """The outcome of a finished episode."""
        scores = episode.scores
        return cls(episode.seed, episode.success, max(scores), scores[-1], episode.steps)


@dataclass(frozen=True)
class ClosedLoop:
    """The outcomes of one policy, and the settings: the "policy", the "task", how many "rows" per observation, ..."""

    settings: dict[str, Any]
    outcomes: list[EpisodeOutcome]

    @property
    def seeds(self) -> list[int]:
        """The seeds in the order they were run."""
        return [outcome.seed for outcome in self.outcomes]

    def measures(self) -> dict[str, np.ndarray]:
        """Every measure's value per seed: shares as booleans, scores as floats."""
        best, final = (np.array([getattr(o, name) for o in self.outcomes]) for name in ("score_max", "score_final"))
        reached = {f"reached_{level:g}": best >= level for level in self.settings["task"]["levels"]}
        success = np.array([outcome.success for outcome in self.outcomes])
        return {"success": success, **reached, "score_max": best, "score_final": final}

    def estimates(self) -> dict[str, Estimate]:
        """Every measure's mean: Wilson's interval for shares, a bootstrap over the seeds for scores."""
        bootstrap = ClusterBootstrap(np.array(self.seeds), seed=BOOTSTRAP_SEED)
        per_measure = {
            name: wilson(int(values.sum()), len(values)) if values.dtype == bool else bootstrap.mean(values)
            for name, values in self.measures().items()
        }
        return {name: estimate for name, estimate in per_measure.items() if estimate is not None}


@dataclass(frozen=True)
class Comparison:
    """This policy and another on the same seeds: paired differences (this - other) and exact tests of the shares."""

    other: ClosedLoop
    differences: dict[str, Estimate]
    tests: dict[str, McNemar]


@dataclass(frozen=True)
class ImaginedReturns:
    """Returns in the world model from the same starts, before and after reinforcement learning there.

    `episodes` gives the recording that each start frame comes from.
    """

    before: list[float]
    after: list[float]
    episodes: list[int]

    def __post_init__(self) -> None:
        """Check that the three arrays are consistent."""
        sizes = len(self.before), len(self.after), len(self.episodes)
        if len(set(sizes)) > 1 or not sizes[0] or not np.isfinite([*self.before, *self.after]).all():
            raise ValueError(f"imagined returns: expected three equally long lists of finite numbers, found {sizes}")

    def estimates(self) -> dict[str, Estimate]:
        """Means "before" and "after" and the mean paired "difference", with a bootstrap over the recordings."""
        bootstrap = ClusterBootstrap(np.array(self.episodes), seed=BOOTSTRAP_SEED)
        before, after = np.array(self.before, float), np.array(self.after, float)
        per_measure = {"before": before, "after": after, "difference": after - before}
        return {name: mean for name, values in per_measure.items() if (mean := bootstrap.mean(values)) is not None}


def summarise(policy: str, episodes: Sequence[Episode], **facts: Any) -> ClosedLoop:
    """The outcomes of finished episodes; `facts` are plain data stored in the settings."""
    settings = {"policy": policy, "task": plain(episodes[0].world.task), "rows": episodes[0].rows, **facts}
    return ClosedLoop(settings, [EpisodeOutcome.of(episode) for episode in episodes])


def plain(task: Task) -> dict[str, Any]:
    """The task as it reads back from a results file."""
    return json.loads(json.dumps(dataclasses.asdict(task)))


def compare(this: ClosedLoop, other: ClosedLoop) -> Comparison:
    """Pair two evaluations by seed; ValueError unless both were run on the same seeds of the same task."""
    check_pairing(this.settings["task"], this.seeds, other)
    bootstrap = ClusterBootstrap(np.array(this.seeds), seed=BOOTSTRAP_SEED)
    pairs = {name: (values, other.measures()[name]) for name, values in this.measures().items()}
    means = {name: bootstrap.mean(a.astype(float) - b.astype(float)) for name, (a, b) in pairs.items()}
    tests = {name: mcnemar(a, b) for name, (a, b) in pairs.items() if a.dtype == bool}
    return Comparison(other, {name: mean for name, mean in means.items() if mean is not None}, tests)


def check_pairing(task: Mapping[str, Any], seeds: Sequence[int], other: ClosedLoop) -> None:
    """Raise unless the other policy was run on the same seeds of the same task; cheap: call it before the episodes."""
    theirs, name = other.settings["task"], other.settings["policy"]
    different = [key for key in (*task, *theirs) if task.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"evaluation of {name}: task.{key}: expected {task.get(key)} as in the evaluation to compare with it, "
            f"found {theirs.get(key)}; evaluate both again with one installation"
        )
    if list(seeds) != other.seeds:
        raise ValueError(
            f"evaluation of {name}: expected outcomes of the seeds {_span(seeds)}, found {_span(other.seeds)}; "
            "evaluate both with the same --seed and --episodes"
        )


def to_json(evaluation: ClosedLoop, comparison: Comparison | None = None) -> str:
    """The contents of closed_loop.json.

    {"settings", "estimates": {measure: estimate}, "comparison" (only if given): {"with", "differences": {measure:
    estimate}, "mcnemar": {measure: {"only_first", "only_second", "p_value"}}}, "outcomes": [{"seed", "success",
    "score_max", "score_final", "steps"}]} with estimate = {"value", "low", "high", "count", "clusters"}.
    """
    content: dict[str, Any] = {"settings": evaluation.settings, "estimates": _plain(evaluation.estimates())}
    if comparison:
        content["comparison"] = {
            "with": comparison.other.settings["policy"],
            "differences": _plain(comparison.differences),
            "mcnemar": _plain(comparison.tests),
        }
    content["outcomes"] = [dataclasses.asdict(outcome) for outcome in evaluation.outcomes]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(value) for name, value in values.items()}


def write(workdir: str | Path, evaluation: ClosedLoop, comparison: Comparison | None = None) -> None:
    """Write closed_loop.json into a folder."""
    write_text(Path(workdir) / RESULTS_FILE, to_json(evaluation, comparison))


def write_imagined(workdir: str | Path, imagined: ImaginedReturns) -> None:
    """Write the returns into the run folder, for its closed-loop table."""
    write_text(Path(workdir) / IMAGINED_FILE, json.dumps(dataclasses.asdict(imagined)) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load_imagined(workdir: str | Path) -> ImaginedReturns | None:
    """The returns that reinforcement learning left in its run folder; None for any other folder."""
    path = Path(workdir) / IMAGINED_FILE
    if not path.is_file():
        return None
    try:
        return ImaginedReturns(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the imagined returns of a run, found damage ({error}); delete the file"
        ) from error


def load(workdir: str | Path) -> ClosedLoop:
    """Read the outcomes of an earlier evaluation from a run folder."""
    path = Path(workdir) / RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the outcomes of an evaluation, found no such file; first run "
            f"python -m launch.evaluate_policy --workdir={workdir}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, outcomes = content["settings"], [_outcome(row) for row in content["outcomes"]]
        Task(**settings["task"])  # checks that all fields are present, and no others
        if not isinstance(settings["policy"], str) or not isinstance(settings["rows"], int):
            raise TypeError("policy and rows are of another kind")
        if len({outcome.seed for outcome in outcomes}) < max(len(outcomes), 2):
            raise ValueError("fewer than two outcomes, or two of one seed")
        evaluation = ClosedLoop(settings, outcomes)
        evaluation.measures()
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: expected the outcomes of an evaluation, found damage ({reason}); delete it and run "
            f"python -m launch.evaluate_policy --workdir={workdir} again"
        ) from error
    return evaluation


def _outcome(row: Mapping[str, Any]) -> EpisodeOutcome:
    for field in dataclasses.fields(EpisodeOutcome):
        if type(row[field.name]) is not field.type or not math.isfinite(row[field.name]):
            raise TypeError(f"{field.name} of an outcome is {row[field.name]!r}")
    return EpisodeOutcome(**row)


def _span(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]} ({len(seeds)})" if seeds else "none"
