"""Does imagination rank policies as the simulator does? Spearman's coefficient over policies evaluated in both.

Reinforcement learning leaves, in its run folder, the imagined returns of its clone and of what became of it, from the
same starts with the same noise; `launch.evaluate_policy` leaves the real outcomes of each in its own folder.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
from jaxtyping import Float

from rlawm_jax import markdown
from rlawm_jax.evaluation import closed_loop
from rlawm_jax.evaluation.closed_loop import BOOTSTRAP_SEED
from rlawm_jax.evaluation.results import format_estimate
from rlawm_jax.evaluation.statistics import DRAWS, Estimate

# fewer say next to nothing: of four in random order one in twelve pairs of orders agrees or is reversed
LEAST = 5


@dataclass(frozen=True)
class Ranked:
    """One policy: its mean imagined return, and its estimate of every real measure."""

    name: str
    imagined: float
    real: dict[str, Estimate]


def load(runs: Sequence[str | Path], clones: Sequence[str | Path]) -> list[Ranked]:
    """The policies of `runs` and those of `clones`, run by run the clone that learning began from; each clone once.

    Errors name the folder that lacks an evaluation, or was evaluated on another task, seeds or held-out starts.
    """
    if len(runs) != len(clones):
        raise ValueError(f"--clones: expected one folder for each of the {len(runs)} --runs, found {len(clones)}")
    first, ranked = closed_loop.load(runs[0]), {}
    starts = None
    for run, clone in zip(runs, clones, strict=True):
        returns = closed_loop.load_imagined(run)
        if returns is None:
            raise FileNotFoundError(
                f"{run}: expected the imagined returns that launch.train_rl leaves at its end, found none"
            )
        starts = starts or returns.episodes
        if returns.episodes != starts:
            raise ValueError(
                f"{run}: expected imagined returns from {len(starts)} held-out starts as in {runs[0]}, found "
                f"{len(returns.episodes)}; give runs that learned from one dataset"
            )
        known = ranked.get(str(clone))
        if known and not np.isclose(known.imagined, np.mean(returns.before), rtol=1e-3):
            raise ValueError(
                f"{run}: expected the imagined return {known.imagined:.3f} of {clone} as in earlier --runs, found "
                f"{np.mean(returns.before):.3f}; give runs in one world model with one reward"
            )
        for folder, values in ((clone, returns.before), (run, returns.after)):
            evaluation = closed_loop.load(folder)
            closed_loop.check_pairing(first.settings["task"], first.seeds, evaluation)
            ranked[str(folder)] = Ranked(str(folder), float(np.mean(values)), evaluation.estimates())
    if len(ranked) < LEAST:
        raise ValueError(f"--runs: expected {LEAST} policies or more, clones included, found {len(ranked)}")
    return list(ranked.values())


def spearman(imagined: Float[np.ndarray, " n"], real: Float[np.ndarray, " n"], *, draws: int = DRAWS) -> Estimate:
    """Spearman's rank correlation over policies, with a percentile bootstrap over them; NaN where all are equal."""
    rows = np.random.default_rng(BOOTSTRAP_SEED).integers(len(imagined), size=(draws, len(imagined)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        value = np.asarray(scipy.stats.spearmanr(imagined, real))[0]
        drawn = np.array([np.asarray(scipy.stats.spearmanr(imagined[row], real[row]))[0] for row in rows])
    drawn = drawn[~np.isnan(drawn)]  # draws of one policy alone have no order
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), len(imagined), len(imagined))


def format_markdown(policies: Sequence[Ranked]) -> str:
    """A line per policy, best imagined return first, and the coefficient of every measure below."""
    measures = list(policies[0].real)
    ordered = sorted(policies, key=lambda policy: -policy.imagined)
    rows = [
        (p.name, f"{p.imagined:.3f}", *(format_estimate(p.real[measure], 3) for measure in measures)) for p in ordered
    ]
    imagined = np.array([p.imagined for p in policies])
    coefficients = [
        format_estimate(spearman(imagined, np.array([p.real[measure].value for p in policies])), 2)
        for measure in measures
    ]
    rows.append((f"**Spearman's coefficient, {len(policies)} policies**", "", *coefficients))
    return markdown.table(("policy", "imagined return", *measures), rows)
