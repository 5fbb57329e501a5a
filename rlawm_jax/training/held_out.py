"""Does the model use its actions? Measured while it trains, on a few held-out windows, before the time is spent.

The windows, their noise and the actions of another window (`data.windows.other_windows`) are fixed by `eval.seed`, so
the numbers depend on the parameters alone; nothing of the training state changes. Shapes: b windows, r action rows.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from data.pipeline import WindowLoader
from data.windows import Window, other_windows
from rlawm_jax.flow import Sampler
from rlawm_jax.hosts import compiled
from rlawm_jax.imagination import Chunk, advance
from rlawm_jax.rng import stream
from rlawm_jax.run_folder.logging import announce
from rlawm_jax.sharding import batch_sharding, batch_share, on_mesh, replicated, shard_batch, tree_shardings
from rlawm_jax.training.state import TrainState, join_model
from rlawm_jax.training.step import token_batch

WINDOWS = 64  # at most, and at most a batch at a time
DRAWS = 4
ANOTHERS = "anothers"  # the batch's key for the other windows' actions


class HeldOut:
    """Errors of the mean of a few draws, with own and with another's actions, as shares of copying the first frame."""

    def __init__(self, config: ConfigDict, graphdef: nnx.GraphDef, loader: WindowLoader, mesh: Mesh) -> None:
        self.first = config.objectives.denoiser.start_step
        self.every = config.train.validate_every
        self.mesh = mesh
        self.batches = _batches(config, loader, mesh) if self.every else []
        if self.every and not self.batches:
            announce("no held-out windows to measure while training (data.val_episodes): the log has no val/ values")
        key = stream(jax.random.key(config.eval.seed), "held_out")
        self.function = partial(_errors, graphdef, Sampler(**config.sampler), key)
        self.program: Any = None

    def __call__(self, step: int, state: TrainState, frozen: nnx.State) -> dict[str, float]:
        """The values to log after `step`; none where it is not due or the denoiser has not started."""
        if not self.batches or step % self.every or step <= self.first:
            return {}
        given = state.params, state.latent_scale, frozen
        if self.program is None:
            shardings = *(tree_shardings(tree, self.mesh) for tree in given), batch_sharding(self.mesh)
            function = jax.jit(
                on_mesh(self.function, self.mesh), in_shardings=shardings, out_shardings=replicated(self.mesh)
            )
            self.program = compiled(function, *given, self.batches[0])
        shares = jax.device_get([self.program(*given, batch) for batch in self.batches])
        own, anothers, ceiling, copy = np.mean(shares, axis=0)
        return {
            "val/own_over_copy": float(own / copy),
            "val/anothers_over_copy": float(anothers / copy),
            "val/own_minus_anothers_over_copy": float((own - anothers) / copy),
            "val/reconstruction_over_copy": float(ceiling / copy),
        }


def _batches(config: ConfigDict, loader: WindowLoader, mesh: Mesh) -> list[dict[str, jax.Array]]:
    """Windows as long as one prediction, in equal batches no larger than those of training, on the devices."""
    horizon = min(config.eval.chunk, config.data.max_horizon)
    windows = loader.validation_windows(horizon, WINDOWS, seed=config.eval.seed, at_most=True)
    others = other_windows(windows, [loader.robot_of(window) for window in windows], seed=config.eval.seed)
    pairs = [(window, other) for window, other in zip(windows, others, strict=True) if other is not None]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = min(config.data.batch_size // config.train.accumulate, len(pairs) // parts * parts)
    part, count = batch_share(mesh)
    own = slice(part * size // count, (part + 1) * size // count)
    numbered = list(enumerate(pairs))
    whole = range(0, len(pairs) - size + 1, size) if size else ()
    return [shard_batch(_read(loader, numbered[first : first + size][own]), mesh) for first in whole]


def _read(loader: WindowLoader, pairs: Sequence[tuple[int, tuple[Window, Window]]]) -> dict[str, np.ndarray]:
    """This process's windows as a training batch, and the other windows' actions beside their own."""
    batch = loader.load_pairs([own for _, (own, _) in pairs], [number for number, _ in pairs])
    if "tokens" in batch:
        batch.pop("frames", None)
    batch[ANOTHERS] = np.zeros_like(batch["actions"])
    for row, count, (_, (_, other)) in zip(batch[ANOTHERS], batch["num_actions"], pairs, strict=True):
        row[:count] = loader.actions(other, count)
    return batch


def _errors(
    graphdef: nnx.GraphDef,
    sampler: Sampler,
    key: Array,
    params: dict[str, nnx.State],
    latent_scale: Array,
    frozen: nnx.State,
    batch: dict[str, Array],
) -> Array:
    """DINO L1 over a batch: of the mean of the draws with own and with another's actions, the ceiling's, and copy's."""
    model = join_model(graphdef, params, frozen, latent_scale)
    given = token_batch(model, batch)

    def mean_of_draws(actions: Array) -> Array:
        def add(total: Array, draw: Array) -> tuple[Array, None]:
            chunk, ids = Chunk(actions, given.num_actions), batch["window_id"]
            noise = stream(key, "sample", draw)
            tokens, _ = advance(model, given.s0, chunk, noise, robot_id=given.robot_id, ids=ids, sampler=sampler)
            return total + tokens / DRAWS, None

        return jax.lax.scan(add, jnp.zeros_like(given.s0), jnp.arange(DRAWS))[0]

    ceiling = model.apply_latent(given.s0, model.latent(given.s0, given.s1))
    guesses = mean_of_draws(given.actions), mean_of_draws(batch[ANOTHERS]), ceiling, given.s0
    return jnp.stack([jnp.abs(guess - given.s1).mean() for guess in guesses])
