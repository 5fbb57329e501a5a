"""Several training runs of one recipe with different training seeds: a line per run, and pooled results.

A pooled mean is over runs and test cases; its interval resamples both (a crossed bootstrap), so that neither a lucky
training run nor an easy test case is mistaken for a result. For a single run only the test cases are resampled, and
shares have Wilson's interval. The difference of two recipes is taken case by case and, where their training seeds are
the same, run by run: what a seed does to both cancels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rlawm_jax import markdown
from rlawm_jax.evaluation import closed_loop
from rlawm_jax.evaluation.closed_loop import BOOTSTRAP_SEED
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.evaluation.statistics import Estimate, crossed_bootstrap, wilson
from rlawm_jax.run_folder.checkpoint import Checkpointer

VALIDATION_FILE = "validation.json"
ERROR, GAIN = "held-out action MSE", "imagined gain, held-out"
Seeds = tuple[int | None, int | None]


@dataclass(frozen=True)
class Runs:
    """One recipe's runs: `values` holds [runs, cases] by measure, `scalars` one number per run by measure.

    `seeds` are those in the run's checkpoint, of the policy's training and of its data; after reinforcement learning
    the second is that of the learning. Unknown ones are None. `shares` names the measures that are yes or no for each
    case.
    """

    names: list[str]
    seeds: list[Seeds]
    values: dict[str, Float[np.ndarray, "r n"]]
    scalars: dict[str, Float[np.ndarray, " r"]]
    shares: frozenset[str]


def load(folders: Sequence[str | Path]) -> Runs:
    """Read what launch.train_policy, launch.train_rl and launch.evaluate_policy wrote to each folder.

    Only measures that every run has are used. Raises FileNotFoundError or ValueError naming a folder that was not
    evaluated, or that was evaluated on different seeds from the first.
    """
    evaluations = [closed_loop.load(folder) for folder in folders]
    first = evaluations[0]
    for other in evaluations[1:]:
        closed_loop.check_pairing(first.settings["task"], first.seeds, other)
    measures = [evaluation.measures() for evaluation in evaluations]
    values = {name: np.stack([m[name].astype(float) for m in measures]) for name in measures[0]}
    shares = frozenset(name for name, cases in measures[0].items() if cases.dtype == bool)
    gains = [closed_loop.load_imagined(folder) for folder in folders]
    if all(gain is not None for gain in gains):
        differences = [np.subtract(gain.after, gain.before) for gain in gains if gain is not None]
        if len({len(d) for d in differences}) > 1:
            raise ValueError(
                f"{folders[0]} and others: expected imagined returns of the same episodes, found different"
            )
        values[GAIN] = np.stack(differences)
    errors = [_validation(Path(folder)) for folder in folders]
    scalars = {ERROR: np.array(errors, float)} if None not in errors else {}
    seeds = [_training_seeds(Path(folder)) for folder in folders]
    return Runs([str(folder) for folder in folders], seeds, values, scalars, shares)


def _training_seeds(folder: Path) -> Seeds:
    if not (folder / "checkpoints").is_dir():
        return None, None  # a baseline's folder
    checkpoints = Checkpointer(folder, read_only=True)
    try:
        step = checkpoints.latest()
        if step is None:
            return None, None
        return json.loads(checkpoints.meta(step)["config"])["seed"], checkpoints.data(step).get("seed")
    finally:
        checkpoints.close()


def _validation(folder: Path) -> float | None:
    path = folder / VALIDATION_FILE
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["policy"]["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a policy's validation, found damage ({error}); train it again") from error


def format_markdown(these: Runs, others: Runs | None = None) -> str:
    """A line per run, a pooled line per recipe, and their difference (these - others, see `pairing`)."""
    groups = [these, others] if others else [these]
    shown = [name for name in (ERROR, GAIN) if any(name in {*g.values, *g.scalars} for g in groups)]
    shown += [name for name in these.values if name != GAIN]
    rows = []
    for group in groups:
        for i, name in enumerate(group.names):
            rows.append(_row(name, [_of_run(group, measure, i) for measure in shown]))
        if len(group.names) > 1:
            rows.append(_row(f"all {len(group.names)}", [_pooled(group, measure) for measure in shown]))
    if others:
        rows.append(_row("difference", [_difference(these, others, measure) for measure in shown]))
    return markdown.table(["run", *map(_label, shown)], rows)


def pairing(these: Runs, others: Runs) -> str:
    """What the difference is paired by, in one sentence for under the table."""
    if _partners(these, others) is not None:
        return "Difference: paired by training seed and by test case."
    settings = (
        ", ".join("unknown" if None in seeds else "/".join(map(str, seeds)) for seeds in g.seeds)
        for g in (these, others)
    )
    return f"Difference: runs unpaired (training seeds {' against '.join(settings)}); paired by test case only."


def _partners(these: Runs, others: Runs) -> list[int] | None:
    """For each of these runs, the number of the other run of its seeds; None unless all match one to one."""
    known = all(None not in seeds for seeds in (*these.seeds, *others.seeds))
    if not known or len(set(these.seeds)) < len(these.seeds) or sorted(these.seeds) != sorted(others.seeds):
        return None
    return [others.seeds.index(seeds) for seeds in these.seeds]


def _row(name: str, cells: Sequence[Estimate | float | None]) -> list[str]:
    texts = ["" if c is None else f"{c:.3f}" if isinstance(c, (float, int)) else format_estimate(c, 3) for c in cells]
    return [name, *texts]


def _label(name: str) -> str:
    return {"score_max": "best score", "score_final": "score at the end"}.get(name, name.replace("_", " "))


def _of_run(group: Runs, measure: str, i: int) -> Estimate | float | None:
    if measure in group.scalars:
        return float(group.scalars[measure][i])
    values = group.values.get(measure)
    return None if values is None else _mean(values[i : i + 1], share=measure in group.shares)


def _pooled(group: Runs, measure: str) -> Estimate | None:
    values = _table(group, measure)
    return None if values is None else _mean(values, share=measure in group.shares)


def _mean(values: Float[np.ndarray, "r n"], *, share: bool) -> Estimate:
    # if all cases agree, the bootstrap interval has zero width: for 0 of 200 it would be [0, 0]
    if share and (len(values) == 1 or np.ptp(values) == 0):
        return wilson(int(values[0].sum()), values.shape[1])
    return crossed_bootstrap(values, seed=BOOTSTRAP_SEED)


def _difference(these: Runs, others: Runs, measure: str) -> Estimate | None:
    ours, theirs = _table(these, measure), _table(others, measure)
    if ours is None or theirs is None or ours.shape[1] != theirs.shape[1]:
        return None
    if measure in these.shares and np.ptp(ours) == np.ptp(theirs) == 0:
        return None  # nothing varies, so the difference cannot be assessed
    partners = _partners(these, others)
    if partners is None:
        return crossed_bootstrap(ours, theirs, seed=BOOTSTRAP_SEED)
    return crossed_bootstrap(ours - theirs[partners], seed=BOOTSTRAP_SEED)


def _table(group: Runs, measure: str) -> Float[np.ndarray, "r n"] | None:
    if measure in group.scalars:
        return group.scalars[measure][:, None]
    return group.values.get(measure)
