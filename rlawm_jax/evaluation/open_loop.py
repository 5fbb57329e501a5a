"""Open-loop evaluation: given one frame and the recorded actions, how close is the prediction to the true last frame?

Every result is reported next to baselines on the same windows: copy-last-frame (nothing changes), the RLA ceiling (the
decoder with the latent of the true pair: the result of a perfect denoiser), random latents (the decoder with pure
noise: how far its blur alone gets without a denoiser) and the mean latent. The model also predicts with another
window's actions and with actions that hold still, from the same noise: what it loses is what it knows from its actions.
METHOD.md 7; all but the first two are our additions. Shapes: n chunks of a rollout, b windows of a batch, l patches,
c channels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer
from ml_collections import ConfigDict

from data.pipeline import WindowLoader
from data.windows import Window, other_windows
from rlawm_jax.evaluation import chunking, programs
from rlawm_jax.evaluation.chunking import Chunking
from rlawm_jax.evaluation.results import (
    CEILING,
    COPY,
    MEAN,
    MEAN_LATENT,
    RANDOM_MEAN,
    RANDOM_SINGLE,
    SINGLE,
    Errors,
    Evaluation,
    Result,
    summarise,
)
from rlawm_jax.evaluation.statistics import DRAWS
from rlawm_jax.evaluation.window_batch import (
    WindowBatch,
    cut_actions,
    instead_of,
    last_row,
    read_windows,
    window_id,
)
from rlawm_jax.flow import Sampler
from rlawm_jax.hosts import exchange
from rlawm_jax.image_metrics import Lpips
from rlawm_jax.rng import stream
from rlawm_jax.world_model import WorldModel

CURVE_POINTS = 4  # points of the error-over-horizon curve within the first chunk

Progress = Callable[[int], Any]


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
        longest = chunking.longest_chunk(config)
        if images and not loader.with_frames:
            raise ValueError("evaluation: expected a loader with frames for the image metrics, found tokens only")
        self.config, self.loader, self.images, self.lpips = config.eval, loader, images, lpips
        self.cut: Chunking = cut or partial(chunking.exact, longest=longest, last_action=last_action)
        self.grid = model.grid
        self.graphdef, self.state = nnx.split(model)
        graphdef = self.graphdef
        self.key = stream(jax.random.key(config.eval.seed), "evaluation")
        self._encode = jax.jit(partial(programs.encode, graphdef))
        self._roll = jax.jit(partial(programs.roll, graphdef, Sampler(**config.sampler)))
        self._roll_random = jax.jit(partial(programs.roll_random, graphdef))
        self._roll_latents = jax.jit(partial(programs.roll_latents, graphdef))
        self._true_latents = jax.jit(partial(programs.true_latents, graphdef))
        self._reconstruct = jax.jit(partial(programs.reconstruct, graphdef))
        self._decode = jax.jit(partial(programs.decode, graphdef))
        self._halfway = jax.jit(partial(programs.halfway, graphdef))
        self._errors = jax.jit(partial(programs.errors, graphdef, threshold=config.eval.changed_threshold))

    def chunk_rows(self, horizon: int) -> list[int]:
        """Action rows of each prediction for a window of `horizon` frames."""
        return [piece.rows for piece in self.cut(horizon)]

    def batches(
        self,
        windows: Sequence[Window],
        *,
        images: bool,
        marks: Sequence[int] = (),
        others: Sequence[Window | None] | None = None,
    ) -> Iterator[tuple[WindowBatch, int]]:
        """Fixed-size batches and their numbers of valid entries; the last is padded by repeating its last window."""
        size = self.config.batch_size
        for i in range(0, len(windows), size):
            which = np.minimum(np.arange(i, i + size), len(windows) - 1)
            other = None if others is None else [others[j] for j in which]
            batch = self.load([windows[j] for j in which], images=images, marks=marks, others=other)
            yield batch, min(size, len(windows) - i)

    def load(
        self,
        windows: Sequence[Window],
        *,
        images: bool,
        marks: Sequence[int] = (),
        others: Sequence[Window | None] | None = None,
    ) -> WindowBatch:
        """Read windows of one horizon: actions, true tokens first and at `marks` (frames; default: chunk ends).

        With `others`, also the actions to compare with: theirs, and those that hold still.
        """
        pieces, loader, longest = self.cut(windows[0].horizon), self.loader, self.config.chunk - 1
        ends = list(marks or (piece.frame for piece in pieces))
        data = read_windows(loader, windows, [0, *ends], last_row(pieces) + 1)
        tokens = data["tokens"] if "tokens" in data else self._encode(self.state, data["frames"])
        return WindowBatch(
            start=jnp.asarray(tokens[0], jnp.float32),
            truth=jnp.asarray(tokens[1:], jnp.float32),
            moving=jnp.asarray(np.stack([loader.moving_patches(w, ends, self.grid) for w in windows], axis=1)),
            chunks=cut_actions(data["actions"], pieces, longest),
            instead={} if others is None else instead_of(loader, windows, others, data["actions"], pieces, longest),
            robot_id=jnp.array([loader.robot_of(window) for window in windows], jnp.int32),
            ids=jnp.array([window_id(loader, window) for window in windows], jnp.uint32),
            images=data["frames"][-1].astype(np.float32) / 255.0 if images else None,
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

    def roll_latents(self, batch: WindowBatch, latents: Float[Array, "n k d"]) -> Float[Array, "n b l c"]:
        """Tokens after every chunk when its raw latent is the same for every window."""
        return self._roll_latents(self.state, batch.start, latents)

    def measure(self, windows: Sequence[Window], *, images: bool, progress: Progress = lambda n: None) -> list[Errors]:
        """Errors of every predictor at the end of every chunk, per window; image metrics only at the last chunk.

        In a multi-process run the batches are divided among the processes, and every process returns all results.
        """
        others = other_windows(windows, [self.loader.robot_of(w) for w in windows], seed=self.config.seed)
        mean_latents = self.mean_latents(windows)
        mine: list[Errors] = []
        for own, turn in self._turns(len(windows)):
            for batch, valid in self.batches(windows[own], images=images, others=others[own]):
                measured = jax.device_get(self._measure(batch, mean_latents))
                mine.append(jax.tree.map(itemgetter(slice(valid)), measured))
            progress(turn)
        rounds = itertools.zip_longest(*exchange(mine))
        collected = [errors for turn in rounds for errors in turn if errors is not None]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *collected)

    def mean_latents(self, windows: Sequence[Window]) -> Float[Array, "n k d"]:
        """The raw latent of the true frames at each chunk's start and end, averaged over the windows."""
        total: Any = 0
        for own, _ in self._turns(len(windows)):
            for batch, valid in self.batches(windows[own], images=False):
                latents = self._true_latents(self.state, batch.start, batch.truth)
                total = total + np.asarray(latents, np.float64)[:, :valid].sum(axis=1)
        return jnp.asarray(sum(exchange(total)) / len(windows), jnp.float32)

    def _turns(self, count: int) -> Iterator[tuple[slice, int]]:
        """This process's windows of each turn in which every process takes one batch, and the turn's total."""
        size, processes = self.config.batch_size, jax.process_count()
        for first in range(0, count, processes * size):
            start = first + jax.process_index() * size
            yield slice(start, start + size), min(processes * size, count - first)

    def _measure(self, batch: WindowBatch, mean_latents: Float[Array, "n k d"]) -> list[Any]:
        ceiling = [self.reconstruct(batch.start, truth) for truth in batch.truth]
        errors = partial(self._errors_of, batch, ceiling[0][1])
        single, mean = self._sampled(partial(self.roll, batch), errors)
        random_single, random_mean = self._sampled(lambda sample: (self.roll_random(batch, sample), None), errors)
        # decoding costs more than predicting, so these rows have no image metrics
        plain = partial(errors, with_images=False)
        rows = {SINGLE: single, MEAN: mean, RANDOM_SINGLE: random_single, RANDOM_MEAN: random_mean}
        constant = jnp.broadcast_to(mean_latents[:, None], (len(mean_latents), *ceiling[0][1].shape))
        for row, (chunks, known) in batch.instead.items():
            roll = partial(self.roll, batch._replace(chunks=chunks))
            still_errors = self._sampled(roll, plain)[1] if known.any() else plain(batch.truth, constant)
            rows[row] = jax.tree.map(lambda values, known=known: jnp.where(known, values, jnp.nan), still_errors)
        rows |= {
            MEAN_LATENT: plain(self.roll_latents(batch, mean_latents), constant),
            COPY: errors(jnp.broadcast_to(batch.start, batch.truth.shape)),
            CEILING: errors(jnp.stack([tokens for tokens, _ in ceiling])),
        }
        return [{row: still_errors[mark] for row, still_errors in rows.items()} for mark in range(len(batch.truth))]

    def _sampled(self, roll: Callable[[int], tuple[Array, Any]], errors: Callable[..., list[Any]]) -> tuple[Any, Any]:
        """The mean of the draws' errors, and the errors of the mean of the draws, at every chunk's end."""
        draws, tokens_sum, latents_sum = [], jnp.zeros(()), jnp.zeros(())
        for sample in range(self.config.samples):
            tokens, latents = roll(sample)
            # the first draw's images are as good an estimate as any
            draws.append(errors(tokens, latents, **({} if sample == 0 else {"with_images": False})))
            tokens_sum = tokens_sum + tokens
            latents_sum = None if latents is None else latents_sum + latents
        mean = errors(tokens_sum / len(draws), None if latents_sum is None else latents_sum / len(draws))
        return [_mean_of_draws([draw[mark] for draw in draws]) for mark in range(len(mean))], mean

    def _errors_of(
        self,
        batch: WindowBatch,
        true_latent: Array,
        tokens: Array,
        latents: Array | None = None,
        *,
        with_images: bool = True,
    ) -> list[Any]:
        """Errors of predicted tokens at every chunk's end, with image metrics at the last one if `with_images`."""
        by_chunk = []
        for mark, truth in enumerate(batch.truth):
            images = batch.images if with_images and mark == len(batch.truth) - 1 else None
            weights = (self.state, self.lpips if images is not None else None)
            by_chunk.append(self._errors(weights, tokens[mark], (batch.start, truth, batch.moving[mark]), images))
        if latents is not None:  # predicted and true latents span the same frames only in the first chunk
            by_chunk[0]["latent_l1"] = jnp.abs(latents[0] - true_latent).mean(axis=(1, 2))
        return by_chunk


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
