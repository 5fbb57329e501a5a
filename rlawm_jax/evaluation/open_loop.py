"""Open-loop evaluation: given one frame and the recorded actions, how close is the prediction to the true last frame?

Every result is reported next to baselines on the same windows: copy-last-frame (nothing changes), the RLA ceiling (the
decoder with the latent of the true pair: the result of a perfect denoiser), and random latents (the decoder with pure
noise: how far its blur alone gets without a denoiser). METHOD.md 7; the last is our addition. Shapes: n chunks of a
rollout, b windows of a batch, l patches, c channels, r action rows.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, UInt8
from ml_collections import ConfigDict

from data.pipeline import WindowLoader
from data.windows import Window
from rlawm_jax.evaluation import chunking
from rlawm_jax.evaluation.chunking import Chunking, ChunkSpan
from rlawm_jax.evaluation.results import (
    CEILING,
    COPY,
    MEAN,
    RANDOM_MEAN,
    RANDOM_SINGLE,
    SINGLE,
    Errors,
    Evaluation,
    Result,
    summarise,
)
from rlawm_jax.evaluation.statistics import DRAWS
from rlawm_jax.flow import Sampler
from rlawm_jax.hosts import exchange
from rlawm_jax.image_metrics import Lpips, psnr, ssim
from rlawm_jax.imagination import Chunk, imagine
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel

CURVE_POINTS = 4  # points of the error-over-horizon curve within the first chunk

Progress = Callable[[int], Any]


class WindowBatch(NamedTuple):
    """Windows of one horizon on the device: true tokens at the start and at every chunk's end, and the chunks' actions.

    `images` is the true last frame in [0, 1], background black where there is a mask; None without image metrics.
    """

    start: Float[Array, "b l c"]
    truth: Float[Array, "n b l c"]
    chunks: Chunk
    robot_id: Int[Array, " b"]
    ids: Integer[Array, " b"]
    images: Float[Array, "b h w 3"] | None


def window_id(loader: WindowLoader, window: Window) -> int:
    """A number derived from the window alone, so that its noise is the same in any list, order or batch size."""
    store = loader.store_of(window)
    name = f"{store.reference}/{store.episode_ids[window.episode]}/{window.start}/{window.horizon}"
    return zlib.crc32(name.encode())


class OpenLoop:
    """A world model prepared for rollouts over windows of recorded video, in batches of a fixed size.

    `images` adds metrics on decoded images (and `lpips`, where given); the loader must then provide frames. `cut`
    splits a horizon into predictions: by default exactly, in balanced chunks.
    """

    def __init__(
        self,
        model: WorldModel,
        config: ConfigDict,
        loader: WindowLoader,
        *,
        images: bool,
        lpips: Lpips | None = None,
        cut: Chunking | None = None,
    ) -> None:
        last_action = config.data.last_action
        longest = config.data.max_horizon + 1 - last_action
        if config.eval.chunk > longest:
            raise ValueError(
                f"config.eval.chunk: expected at most {longest} frames (data.max_horizon rows of "
                f"actions are the most the model reads), found {config.eval.chunk}"
            )
        if images and not loader.with_frames:
            raise ValueError("evaluation: expected a loader with frames for the image metrics, found tokens only")
        self.config, self.loader, self.images, self.lpips = config.eval, loader, images, lpips
        self.cut: Chunking = cut or partial(chunking.exact, longest=config.eval.chunk - 1, last_action=last_action)
        self.grid = model.grid
        graphdef, self.state = nnx.split(model)
        self.key = stream(jax.random.key(config.eval.seed), "evaluation")
        self._encode = jax.jit(partial(_encode, graphdef))
        self._roll = jax.jit(partial(_roll, graphdef, Sampler(**config.sampler)))
        self._roll_random = jax.jit(partial(_roll_random, graphdef))
        self._reconstruct = jax.jit(partial(_reconstruct, graphdef))
        self._decode = jax.jit(partial(_decode, graphdef))
        self._halfway = jax.jit(partial(_halfway, graphdef))
        self._errors = jax.jit(partial(_errors, graphdef, threshold=config.eval.changed_threshold))

    def chunk_rows(self, horizon: int) -> list[int]:
        """Action rows of each prediction for a window of `horizon` frames."""
        return [piece.rows for piece in self.cut(horizon)]

    def batches(
        self, windows: Sequence[Window], *, images: bool, marks: Sequence[int] = ()
    ) -> Iterator[tuple[WindowBatch, int]]:
        """Fixed-size batches and their numbers of valid entries; the last is padded by repeating its last window."""
        size = self.config.batch_size
        for i in range(0, len(windows), size):
            part = list(windows[i : i + size])
            yield self.load(part + part[-1:] * (size - len(part)), images=images, marks=marks), len(part)

    def load(self, windows: Sequence[Window], *, images: bool, marks: Sequence[int] = ()) -> WindowBatch:
        """Read windows of one horizon: actions, true tokens first and at `marks` (frames; default: chunk ends)."""
        pieces = self.cut(windows[0].horizon)
        positions = [0, *(marks or (piece.frame for piece in pieces))]
        # some protocols include the action issued at the last frame
        reach = max(piece.first + piece.rows for piece in pieces) + 1
        loaded = [self.loader.load_window(window._replace(horizon=reach), positions) for window in windows]
        arrays = [name for name in ("frames", "tokens", "actions") if name in loaded[0]]
        data = {name: np.stack([window[name] for window in loaded], axis=1) for name in arrays}
        tokens = data["tokens"] if "tokens" in data else self._encode(self.state, data["frames"])
        last_frames = data["frames"][-1].astype(np.float32) / 255.0 if images else None
        return WindowBatch(
            start=jnp.asarray(tokens[0], jnp.float32),
            truth=jnp.asarray(tokens[1:], jnp.float32),
            chunks=_cut(data["actions"], pieces, self.config.chunk - 1),
            robot_id=jnp.array([window["robot_id"] for window in loaded], jnp.int32),
            ids=jnp.array([window_id(self.loader, window) for window in windows], jnp.uint32),
            images=last_frames,
        )

    def roll(self, batch: WindowBatch, sample: int) -> tuple[Float[Array, "n b l c"], Float[Array, "n b k d"]]:
        """Tokens after every chunk and the sampled raw latents, for draw number `sample`."""
        given = batch.start, batch.chunks, batch.robot_id, batch.ids
        return self._roll(self.state, stream(self.key, "sample", sample), given)

    def roll_random(self, batch: WindowBatch, sample: int) -> Float[Array, "n b l c"]:
        """Tokens after every chunk when the latents are pure noise, for draw number `sample`."""
        given = batch.start, batch.chunks, batch.ids
        return self._roll_random(self.state, stream(self.key, "random_latent", sample), given)

    def reconstruct(
        self, start: Float[Array, "b l c"], truth: Float[Array, "b l c"]
    ) -> tuple[Float[Array, "b l c"], Float[Array, "b k d"]]:
        """Tokens decoded from the true pair's raw latent, and that latent."""
        return self._reconstruct(self.state, start, truth)

    def decode(self, tokens: Float[Array, "b l c"]) -> Float[Array, "b h w 3"]:
        """Decoded images in [0, 1], padded to whole patches."""
        return self._decode(self.state, tokens)

    def halfway(
        self, start: Float[Array, "b l c"], truth: Float[Array, "b l c"], ids: Integer[Array, " b"], draw: int
    ) -> Float[Array, "b l c"]:
        """Tokens decoded from half noise, half latent: Dec(s_t, scale (e + z) / 2), for noise draw number `draw`."""
        return self._halfway(self.state, stream(self.key, "halfway", draw), (start, truth), ids)

    def measure(self, windows: Sequence[Window], *, images: bool, progress: Progress = lambda n: None) -> list[Errors]:
        """Errors of every predictor at the end of every chunk, per window; image metrics only at the last chunk.

        In a multi-process run the batches are divided among the processes, and every process returns all results.
        """
        size, turns = self.config.batch_size, jax.process_count()
        mine: list[Errors] = []
        for first in range(0, len(windows), turns * size):
            start = first + jax.process_index() * size
            for batch, valid in self.batches(windows[start : start + size], images=images):
                mine.append(jax.tree.map(itemgetter(slice(valid)), jax.device_get(self._measure(batch))))
            progress(len(windows[first : first + turns * size]))
        rounds = itertools.zip_longest(*exchange(mine))
        collected = [errors for turn in rounds for errors in turn if errors is not None]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *collected)

    def _measure(self, batch: WindowBatch) -> list[Any]:
        marks = range(len(batch.truth))
        ceiling = [self.reconstruct(batch.start, truth) for truth in batch.truth]

        def errors(tokens: Array, latents: Array | None = None, *, pictured: bool = True) -> list[Any]:
            found = []
            for mark in marks:
                images = batch.images if pictured and mark == marks[-1] else None
                weights = (self.state, self.lpips if images is not None else None)
                found.append(self._errors(weights, tokens[mark], (batch.start, batch.truth[mark]), images))
            if latents is not None:  # predicted and true latents span the same frames only in the first chunk
                found[0]["latent_l1"] = jnp.abs(latents[0] - ceiling[0][1]).mean(axis=(1, 2))
            return found

        draws, tokens_sum, latents_sum = [], jnp.zeros(()), jnp.zeros(())
        random_draws, random_sum = [], jnp.zeros(())
        for sample in range(self.config.samples):
            tokens, latents = self.roll(batch, sample)
            # decoding costs more than predicting, and the first draw's images are as good an estimate as any
            draws.append(errors(tokens, latents, pictured=sample == 0))
            tokens_sum, latents_sum = tokens_sum + tokens, latents_sum + latents
            tokens = self.roll_random(batch, sample)
            random_draws.append(errors(tokens, pictured=sample == 0))
            random_sum = random_sum + tokens
        rows = {
            SINGLE: [_mean_of_draws([draw[mark] for draw in draws]) for mark in marks],
            MEAN: errors(tokens_sum / len(draws), latents_sum / len(draws)),
            RANDOM_SINGLE: [_mean_of_draws([draw[mark] for draw in random_draws]) for mark in marks],
            RANDOM_MEAN: errors(random_sum / len(draws)),
            COPY: errors(jnp.broadcast_to(batch.start, batch.truth.shape)),
            CEILING: errors(jnp.stack([tokens for tokens, _ in ceiling])),
        }
        return [{row: found[mark] for row, found in rows.items()} for mark in marks]


def _mean_of_draws(draws: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Every metric's mean over the draws that have it; the first draw has all metrics."""
    return {name: jnp.mean(jnp.stack([d[name] for d in draws if name in d]), axis=0) for name in draws[0]}


def evaluate(loop: OpenLoop, *, progress: Progress = lambda n: None) -> Evaluation:
    """The table over config.eval.horizons and the error-over-horizon curve; `progress` is told the windows done.

    The curve uses the longest horizon's windows: a few points within the first chunk, then the end of every chunk.
    """
    horizons = sorted(loop.config.horizons)
    results = [
        _at_chunk_ends(loop, evaluation_windows(loop, horizon), images=loop.images, progress=progress)
        for horizon in horizons
    ]
    longest = evaluation_windows(loop, horizons[-1])
    curve = []
    for intervals in curve_points(loop.chunk_rows(horizons[-1])[0]):
        cut = [window._replace(horizon=intervals + 1) for window in longest]
        curve += _at_chunk_ends(loop, cut, images=False, progress=progress)
    return Evaluation(settings(loop), [ends[-1] for ends in results], curve + results[-1])


def _at_chunk_ends(loop: OpenLoop, windows: Sequence[Window], *, images: bool, progress: Progress) -> list[Result]:
    """Results at the end of every chunk of windows of one horizon."""
    pieces, episodes = loop.cut(windows[0].horizon), episode_numbers(windows)
    rows = [piece.rows for piece in pieces]
    return [
        summarise(errors, episodes, pieces[count - 1].frame, rows[:count], seed=loop.config.seed)
        for count, errors in enumerate(loop.measure(windows, images=images, progress=progress), start=1)
    ]


def evaluation_windows(loop: OpenLoop, horizon: int) -> list[Window]:
    """The held-out windows of a horizon, the same for every model."""
    return loop.loader.validation_windows(horizon, loop.config.windows, seed=loop.config.seed)


def episode_numbers(windows: Sequence[Window]) -> Int[np.ndarray, " n"]:
    """A number per window, equal for windows of one episode."""
    return np.unique([window[:3] for window in windows], axis=0, return_inverse=True)[1]


def curve_points(first_chunk: int) -> list[int]:
    """Intervals of the curve's points within the first chunk, excluding its end."""
    return sorted({round(x) for x in np.linspace(1, first_chunk, CURVE_POINTS)} - {first_chunk})


def total_windows(loop: OpenLoop) -> int:
    """The total number of windows `evaluate` reports to `progress`, over all passes."""
    longest = loop.chunk_rows(max(loop.config.horizons))[0]
    return loop.config.windows * (len(loop.config.horizons) + len(curve_points(longest)))


def settings(loop: OpenLoop) -> dict[str, Any]:
    """What the results depend on, apart from the model and the data."""
    names = ("samples", "chunk", "changed_threshold", "seed")
    return {name: loop.config[name] for name in names} | {"bootstrap_draws": DRAWS, "lpips": loop.lpips is not None}


def _cut(actions: Float[np.ndarray, "t b a"], pieces: Sequence[ChunkSpan], longest: int) -> Chunk:
    """The action rows of every chunk, zero-padded to a common length."""
    _, size, width = actions.shape
    rows = [piece.rows for piece in pieces]
    out = np.zeros((len(pieces), size, max(longest, *rows), width), np.float32)
    for chunk, piece in zip(out, pieces, strict=True):
        chunk[:, : piece.rows] = actions[piece.first : piece.first + piece.rows].swapaxes(0, 1)
    return Chunk(jnp.asarray(out), jnp.tile(jnp.array(rows, jnp.int32)[:, None], (1, size)))


def _encode(graphdef: nnx.GraphDef, state: nnx.State, frames: UInt8[Array, "t b h w 3"]) -> Float[Array, "t b l c"]:
    tokens = nnx.merge(graphdef, state).encode(frames.reshape(-1, *frames.shape[2:]))
    return tokens.reshape(*frames.shape[:2], *tokens.shape[1:])


def _roll(
    graphdef: nnx.GraphDef, sampler: Sampler, state: nnx.State, key: Array, given: tuple[Array, Chunk, Array, Array]
) -> tuple[Array, Array]:
    model, (start, chunks, robot_id, ids) = nnx.merge(graphdef, state), given
    rollout = imagine(model, start, chunks, key, robot_id=robot_id, ids=ids, sampler=sampler)
    return rollout.tokens, rollout.latents * model.latent_scale[...]


def _roll_random(graphdef: nnx.GraphDef, state: nnx.State, key: Array, given: tuple[Array, Chunk, Array]) -> Array:
    model, (start, chunks, ids) = nnx.merge(graphdef, state), given

    def step(tokens: Array, i: Array) -> tuple[Array, Array]:
        tokens = model.apply_latent(tokens, model.noise(stream(key, "flow_noise", i), ids))
        return tokens, tokens

    return jax.lax.scan(step, start, jnp.arange(len(chunks.num_actions)))[1]


def _reconstruct(graphdef: nnx.GraphDef, state: nnx.State, start: Array, truth: Array) -> tuple[Array, Array]:
    model = nnx.merge(graphdef, state)
    latent = model.rla.encode(start, truth)
    return model.rla.decode(start, latent), latent


def _decode(graphdef: nnx.GraphDef, state: nnx.State, tokens: Array) -> Array:
    return nnx.merge(graphdef, state).decode(tokens)


def _halfway(graphdef: nnx.GraphDef, state: nnx.State, key: Array, pair: tuple[Array, Array], ids: Array) -> Array:
    model, (start, truth) = nnx.merge(graphdef, state), pair
    return model.apply_latent(start, 0.5 * (model.noise(key, ids) + model.latent(start, truth)))


def _errors(
    graphdef: nnx.GraphDef,
    weights: tuple[nnx.State, Lpips | None],
    tokens: Float[Array, "b l c"],
    pair: tuple[Float[Array, "b l c"], Float[Array, "b l c"]],
    images: Float[Array, "b h w 3"] | None,
    *,
    threshold: float,
) -> dict[str, Float[Array, " b"]]:
    """Errors of predicted tokens, and of the images decoded from them where true images are given."""
    (state, lpips), (start, truth) = weights, pair
    error = jnp.abs(tokens - truth).mean(axis=-1)
    changed = jnp.abs(truth - start).mean(axis=-1) > threshold
    found = {
        "dino_l1": error.mean(axis=-1),
        # 0 / 0 is deliberately NaN: without a changed patch there is no value
        "dino_l1_changed": (error * changed).sum(axis=-1) / changed.sum(axis=-1),
    }
    if images is not None:
        # the decoder outputs the frame padded to whole patches
        decoded = nnx.merge(graphdef, state).decode(tokens)[:, : images.shape[1], : images.shape[2]]
        found |= {"psnr": psnr(decoded, images), "ssim": ssim(decoded, images)}
        if lpips is not None:
            found["lpips"] = lpips(decoded, images)
    return found
