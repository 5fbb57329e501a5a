"""The table of a planner judged in the true simulator."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate, wilson
from rlawm_jax.markdown import table
from rlawm_jax.planning.judge import Judged

BOOTSTRAP_SEED = 2026


def format_table(
    results: Mapping[int, Sequence[Judged]],
    moved: Mapping[int, Float[np.ndarray, "n p"]],
    clusters: Mapping[int, Int[np.ndarray, " n"]],
    *,
    radii: Sequence[float],
    threshold: float,
) -> str:
    """Final and best distances and successes by frames ahead, method and body, each with its 95 % interval.

    `moved` [n, p] is how far effector and objects are from their goals at the start; a body counts only in the
    problems in which that is more than `threshold`. Success is being within a radius at the closest step.
    """
    columns = ["ahead", "body", "method", "n", "start", "final", "best"]
    columns += [f"within {radius:g}" for radius in radii] + ["s per plan"]
    rows = []
    for ahead, judged in results.items():
        for body in range(moved[ahead].shape[1]):
            counts = moved[ahead][:, body] > threshold
            if not counts.any():
                continue
            bootstrap = ClusterBootstrap(clusters[ahead][counts], seed=BOOTSTRAP_SEED)
            for one in judged:
                final, best = one.final[counts, body], one.best[counts, body]
                shares = [wilson(int((best < radius).sum()), int(counts.sum())) for radius in radii]
                seconds = "" if one.seconds_per_plan is None else f"{one.seconds_per_plan:.2f}"
                name = "effector" if body == 0 else "object" if moved[ahead].shape[1] == 2 else f"object {body}"
                means = [bootstrap.mean(values) for values in (final, best)]
                cells = [
                    str(ahead),
                    name,
                    one.method,
                    str(int(counts.sum())),
                    f"{moved[ahead][counts, body].mean():.3f}",
                ]
                cells += [_interval(mean) for mean in means] + [_interval(share, 2) for share in shares]
                rows.append([*cells, seconds])
    return table(columns, rows)


def _interval(estimate: Estimate | None, digits: int = 3) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
