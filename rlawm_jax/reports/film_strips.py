"""The report's images, as arrays: films of rollouts, feature maps, half-way interpolation.

Windows are chosen for motion: those that change most within a seeded pool, at most one per episode.
Images are uint8 and no larger than `SIDE`. Shapes: t frames of a window, b windows, l patches, c channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from data.windows import Window
from rlawm_jax.evaluation.open_loop import OpenLoop, episode_numbers
from rlawm_jax.evaluation.statistics import ClusterBootstrap, Estimate
from rlawm_jax.evaluation.window_batch import WindowBatch
from rlawm_jax.imagination import Chunk

SIDE = 160  # pixels
POOL = 64  # windows from which those with the most change are shown
HALFWAY_DRAWS = 8
PCA_ROWS = 8192

Thumbnail = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Film:
    """One rollout beside the ground truth, at every frame; `ends` are the frames at which a prediction was fed back."""

    label: str
    ends: list[int]
    rows: dict[str, list[Thumbnail]]


@dataclass(frozen=True)
class FeatureMaps:
    """Tokens after one prediction, projected onto three principal components, and each patch's mean absolute error."""

    label: str
    frames: dict[str, Thumbnail]
    components: dict[str, UInt8[np.ndarray, "i j 3"]]
    errors: dict[str, Float[np.ndarray, "i j"]]


@dataclass(frozen=True)
class Halfway:
    """The half-way interpolation Dec(s_t, scale (e + z) / 2) beside the true middle frame."""

    label: str
    frames: dict[str, Thumbnail]


@dataclass(frozen=True)
class Gallery:
    """Everything the report shows that is not a number or a curve; `halfway_errors` are DINO L1 to the true middle."""

    pool: int
    films: list[Film]
    maps: list[FeatureMaps]
    halfway: list[Halfway]
    halfway_errors: dict[str, Estimate]


def collect(loop: OpenLoop) -> Gallery:
    """Roll out and decode what the report shows. Without image metrics (`loop.images`) there are feature maps only."""
    longest = max(loop.config.horizons)
    first_chunk = loop.chunk_rows(longest)[0]
    maps = make_maps(loop, moving_windows(loop, first_chunk + 1))
    films, halfway, errors = [], [], {}
    if loop.images:
        films = make_films(loop, moving_windows(loop, longest))
        even = first_chunk - first_chunk % 2  # intervals of a window with an exact middle frame
        if even:
            halfway = make_halfway(loop, moving_windows(loop, even + 1))
            errors = halfway_errors(loop, pool_windows(loop, even + 1))
    return Gallery(min(POOL, loop.config.windows), films, maps, halfway, errors)


def pool_windows(loop: OpenLoop, horizon: int) -> list[Window]:
    """A seeded sample of held-out windows."""
    return loop.loader.validation_windows(horizon, min(POOL, loop.config.windows), seed=loop.config.seed)


def moving_windows(loop: OpenLoop, horizon: int) -> list[Window]:
    """The `config.eval.strips` windows of the pool that change most from first to last frame, at most one per episode.

    Change is measured on pixels where available: any change in a frame shifts all of its tokens a little.
    """
    pool = pool_windows(loop, horizon)
    what = "frames" if loop.loader.with_frames else "tokens"
    ends = (loop.loader.load_window(window, [0, horizon - 1])[what].astype(np.float32) for window in pool)
    change = [np.abs(last - first).mean() for first, last in ends]
    best: dict[tuple[int, ...], Window] = {}
    for i in np.argsort(change)[::-1]:
        best.setdefault(pool[i][:3], pool[i])
    return list(best.values())[: loop.config.strips]


def make_films(loop: OpenLoop, windows: Sequence[Window]) -> list[Film]:
    """Decode true, predicted, reconstructed and copied tokens at every frame of the windows.

    Between two chunk ends the film shows the prediction from the last end with the actions up to that frame.
    """
    rows = loop.chunk_rows(windows[0].horizon)
    batch = loop.load(windows, images=False, marks=range(1, windows[0].horizon))
    predicted = [batch.start]
    for chunk, count in enumerate(rows):
        start = predicted[-1]
        predicted += [_after(loop, batch, start, chunk, actions) for actions in range(1, count + 1)]
    frames = true_frames(loop, windows)
    copied = thumbnails(loop.decode(batch.start))
    columns = [
        {
            "truth": thumbnails(frames[:, t] / 255.0),
            "decoded": thumbnails(loop.decode(truth)),
            "prediction": thumbnails(loop.decode(tokens)),
            "reconstruction": thumbnails(loop.decode(loop.reconstruct(batch.start, truth)[0])),
            "copy": copied,
        }
        for t, (truth, tokens) in enumerate(zip([batch.start, *batch.truth], predicted, strict=True))
    ]
    return [
        Film(
            _label(loop, window), np.cumsum(rows).tolist(), {name: [c[name][i] for c in columns] for name in columns[0]}
        )
        for i, window in enumerate(windows)
    ]


def _after(
    loop: OpenLoop, batch: WindowBatch, start: Float[Array, "b l c"], chunk: int, count: int
) -> Float[Array, "b l c"]:
    """Tokens `count` actions into a chunk. The chunk's number is the draw, so its frames share their noise."""
    actions = Chunk(batch.chunks.actions[chunk : chunk + 1], jnp.full((1, len(start)), count))
    return loop.roll(batch._replace(start=start, chunks=actions), chunk)[0][-1]


def make_maps(loop: OpenLoop, windows: Sequence[Window]) -> list[FeatureMaps]:
    """Principal components and errors of the tokens one prediction ahead; components are fitted to true tokens."""
    batch = loop.load(windows, images=False)
    truth, draws = batch.truth[-1], [loop.roll(batch, i)[0][-1] for i in range(loop.config.samples)]
    tokens = {"first": batch.start, "truth": truth, "mean": jnp.mean(jnp.stack(draws), axis=0), "single": draws[0]}
    project = fit_components(np.concatenate([batch.start, truth]))
    components = {name: project(np.asarray(values)).reshape(-1, *loop.grid, 3) for name, values in tokens.items()}
    errors = {
        name: np.asarray(jnp.abs(tokens[shown] - truth).mean(axis=-1)).reshape(-1, *loop.grid)
        for name, shown in (("copy", "first"), ("mean", "mean"), ("single", "single"))
    }
    by_name = {}
    if loop.loader.with_frames:
        frames = true_frames(loop, windows) / 255.0
        by_name = {"first": thumbnails(frames[:, 0]), "truth": thumbnails(frames[:, -1])}
    return [
        FeatureMaps(
            _label(loop, window), *({k: v[i] for k, v in shown.items()} for shown in (by_name, components, errors))
        )
        for i, window in enumerate(windows)
    ]


def fit_components(tokens: Float[np.ndarray, "b l c"]) -> Callable[[np.ndarray], np.ndarray]:
    """A function from tokens [..., c] to colours [..., 3]: three principal components, each stretched to 0..255."""
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float32)
    rows = rows[:: -(-len(rows) // PCA_ROWS)]
    mean = rows.mean(axis=0)
    basis = np.linalg.svd(rows - mean, full_matrices=False)[2][:3].T
    low, high = np.percentile((rows - mean) @ basis, (0.2, 99.8), axis=0)

    def project(values: Float[np.ndarray, "... c"]) -> UInt8[np.ndarray, "... 3"]:
        stretched = ((values - mean) @ basis - low) / np.maximum(high - low, 1e-9)
        return (255 * np.clip(stretched, 0, 1)).astype(np.uint8)

    return project


def make_halfway(loop: OpenLoop, windows: Sequence[Window]) -> list[Halfway]:
    """Decoded half-way interpolations of windows that have an exact middle frame."""
    middle = (windows[0].horizon - 1) // 2
    batch = loop.load(windows, images=False)
    frames = true_frames(loop, windows)[:, [0, middle, -1]] / 255.0
    draws = [loop.halfway(batch.start, batch.truth[-1], batch.ids, i) for i in range(HALFWAY_DRAWS)]
    by_name = {name: thumbnails(frames[:, i]) for i, name in enumerate(("first", "middle", "last"))}
    by_name |= {
        "single": thumbnails(loop.decode(draws[0])),
        "mean": thumbnails(loop.decode(jnp.mean(jnp.stack(draws), axis=0))),
    }
    return [
        Halfway(_label(loop, window), {name: shown[i] for name, shown in by_name.items()})
        for i, window in enumerate(windows)
    ]


def halfway_errors(loop: OpenLoop, windows: Sequence[Window]) -> dict[str, Estimate]:
    """DINO L1 to the true middle frame's tokens: of the half-way interpolation and of four simple baselines."""
    horizon = windows[0].horizon
    errors: dict[str, list[np.ndarray]] = {}
    for batch, valid in loop.batches(windows, images=False, marks=[(horizon - 1) // 2, horizon - 1]):
        middle, last = batch.truth
        draws = [loop.halfway(batch.start, last, batch.ids, i) for i in range(HALFWAY_DRAWS)]
        guesses = {
            "mean": jnp.mean(jnp.stack(draws), axis=0),
            "single": draws[0],
            "blend": (batch.start + last) / 2,
            "first": batch.start,
            "last": last,
        }
        for name, tokens in guesses.items():
            errors.setdefault(name, []).append(np.asarray(jnp.abs(tokens - middle).mean(axis=(1, 2)))[:valid])
    bootstrap = ClusterBootstrap(episode_numbers(windows), seed=loop.config.seed)
    estimates = {name: bootstrap.mean(np.concatenate(values)) for name, values in errors.items()}
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def true_frames(loop: OpenLoop, windows: Sequence[Window]) -> UInt8[np.ndarray, "b t h w 3"]:
    """All frames of the windows, background black where there is a mask."""
    loaded = [loop.loader.load_window(window) for window in windows]
    return np.stack([w["frames"] for w in loaded])


def thumbnails(images: Float[np.ndarray | Array, "b h w 3"]) -> list[Thumbnail]:
    """Images in [0, 1] as uint8, downscaled to `SIDE` where larger."""
    small = [Image.fromarray((255 * np.asarray(image)).round().astype(np.uint8)) for image in images]
    for image in small:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return [np.asarray(image) for image in small]


def _label(loop: OpenLoop, window: Window) -> str:
    store = loop.loader.store_of(window)
    last = window.start + window.horizon - 1
    return f"{store.reference}, episode {store.episode_ids[window.episode]}, frames {window.start} to {last}"
