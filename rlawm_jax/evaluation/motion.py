"""Motion in time: is half-way in latent space half-way in time, a property for which nothing is trained (METHOD.md 7)?

Along every path from a window's first frame to its last, the position in time of a point is the number of the true
frame whose tokens are nearest (mean absolute difference). A path's points are as many as its frames, evenly spread, so
that in a world where the property holds exactly the i-th point lies at the i-th frame. Shapes: n frames or points,
b windows, l patches, c channels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from rlawm_jax.evaluation.open_loop import OpenLoop, WindowBatch, episode_numbers, evaluation_windows
from rlawm_jax.evaluation.results import Motion
from rlawm_jax.evaluation.statistics import ClusterBootstrap
from rlawm_jax.rng import stream

NOISE, LATENTS, TOKENS, TRUE = "noise", "latents", "tokens", "true"
FIRST = {NOISE: 0, LATENTS: 1, TOKENS: 0, TRUE: 1}  # frame at which each path starts; all end at the last


def measure(loop: OpenLoop) -> Motion | None:
    """Positions along the paths of the held-out windows of the longest single prediction; None below two intervals.

    NOISE: Dec(s_t, a z + (1 - a) e), the mean over config.eval.samples draws of e of each draw's scores; LATENTS: the
    straight line between the latents of the first step and of the whole window; TOKENS: between the tokens themselves;
    TRUE: no path, the latent of each true frame, which is what the autoencoder and the nearest frame allow.
    """
    intervals = loop.chunk_rows(max(loop.config.horizons))[0]
    if intervals < 2:
        return None
    windows = evaluation_windows(loop, intervals + 1)
    parts: dict[str, list[np.ndarray]] = {path: [] for path in FIRST}
    along_lines, along_noise = (jax.jit(partial(f, loop.graphdef)) for f in (_along_lines, _along_noise))
    for batch, valid in loop.batches(windows, images=False, marks=range(1, intervals + 1)):
        keys = [stream(loop.key, "motion", draw) for draw in range(loop.config.samples)]
        lines = along_lines(loop.state, _frames(batch))
        paths = {path: positions[None] for path, positions in lines.items()}
        paths[NOISE] = np.stack([along_noise(loop.state, key, _frames(batch), batch.ids) for key in keys])
        for path, positions in paths.items():
            parts[path].append(np.asarray(positions)[..., :valid])
    positions = {path: np.concatenate(paths, axis=-1) for path, paths in parts.items()}  # [draws, n, b]
    return _summarise(positions, intervals, ClusterBootstrap(episode_numbers(windows), seed=loop.config.seed))


def _summarise(positions: dict[str, np.ndarray], intervals: int, bootstrap: ClusterBootstrap) -> Motion:
    by_path, points = {}, {}
    for path, draws in positions.items():
        each = [scores(draw, FIRST[path], intervals) for draw in draws]
        values = {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
        by_path[path] = {name: mean for name, v in values.items() if (mean := bootstrap.mean(v))}
        points[path] = [mean for v in draws.mean(axis=0) / intervals if (mean := bootstrap.mean(v))]
    return Motion(intervals, by_path, points)


def scores(positions: Int[np.ndarray, "n b"], first: int, intervals: int) -> dict[str, Float[np.ndarray, " b"]]:
    """How well each window's `positions`, numbers of frames, follow the frames `first` to `intervals`.

    "monotone": the share of neighbouring points that do not go back; "correlation" with linear time, 0 where the
    position never changes; "error": mean distance from linear time, as a share of the window.
    """
    linear = np.arange(first, intervals + 1)[:, None]
    moved, time = positions - positions.mean(axis=0), linear - linear.mean()
    spread = np.sqrt(np.square(moved).sum(axis=0) * np.square(time).sum())
    return {
        "monotone": (np.diff(positions, axis=0) >= 0).mean(axis=0),
        "correlation": (moved * time).sum(axis=0) / np.where(spread > 0, spread, 1),
        "error": np.abs(positions - linear).mean(axis=0) / intervals,
    }


def _frames(batch: WindowBatch) -> Float[Array, "n b l c"]:
    return jnp.concatenate([batch.start[None], batch.truth])


def _along(
    path: str, frames: Float[Array, "n b l c"], point: Callable[[Array], Float[Array, "b l c"]]
) -> Int[Array, "m b"]:
    """The nearest true frame at every point of a path; `point` gives tokens for a share of the way."""

    def nearest(share: Array) -> Array:
        return jnp.abs(frames - point(share)).mean(axis=(2, 3)).argmin(axis=0)

    steps = len(frames) - 1 - FIRST[path]
    return jax.lax.map(nearest, jnp.arange(steps + 1) / steps)


def _along_lines(graphdef: nnx.GraphDef, state: nnx.State, frames: Float[Array, "n b l c"]) -> dict[str, Array]:
    model, start, end = nnx.merge(graphdef, state), frames[0], frames[-1]
    near, far = model.latent(start, frames[1]), model.latent(start, end)

    def of_frame(share: Array) -> Array:
        frame = FIRST[TRUE] + jnp.round(share * (len(frames) - 1 - FIRST[TRUE])).astype(int)
        return model.apply_latent(start, model.latent(start, frames[frame]))

    return {
        LATENTS: _along(LATENTS, frames, lambda a: model.apply_latent(start, a * far + (1 - a) * near)),
        TOKENS: _along(TOKENS, frames, lambda a: a * end + (1 - a) * start),
        TRUE: _along(TRUE, frames, of_frame),
    }


def _along_noise(
    graphdef: nnx.GraphDef, state: nnx.State, key: Array, frames: Float[Array, "n b l c"], ids: Integer[Array, " b"]
) -> Int[Array, "n b"]:
    model, start = nnx.merge(graphdef, state), frames[0]
    far, noise = model.latent(start, frames[-1]), model.noise(key, ids)
    return _along(NOISE, frames, lambda a: model.apply_latent(start, a * far + (1 - a) * noise))
