"""A linear probe that reads the positions of effector and objects from tokens: a distance in metres, not in features.

Shapes: n frames, l patches, c channels, p bodies (the effector, then the objects), d coordinates.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from data.datasets import Datasets

# in mean squared norms of a frame's centred tokens; on the arm's frames errors hardly change between 1e-4 and 0.1
RIDGE = 0.01
BATCH = 50  # frames encoded at a time

Encode = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n l c"]]


class PositionProbe(NamedTuple):
    """Positions as an affine function of all tokens of a frame."""

    weights: Float[Array, "lc pd"]
    offset: Float[Array, "p d"]

    def __call__(self, tokens: Float[Array, "*b l c"]) -> Float[Array, "*b p d"]:
        """Positions in the dataset's unit."""
        flat = tokens.reshape(*tokens.shape[:-2], -1) @ self.weights
        return flat.reshape(*flat.shape[:-1], *self.offset.shape) + self.offset

    def distance(self, imagined: Float[Array, "*b l c"], goal: Float[Array, "*#b l c"]) -> Float[Array, "*b"]:
        """How far apart the bodies are in two sets of tokens, summed over the bodies."""
        return jnp.linalg.norm(self(imagined) - self(goal), axis=-1).sum(axis=-1)


def fit(tokens: Float[np.ndarray, "n l c"], positions: Float[np.ndarray, "n p d"]) -> PositionProbe:
    """Ridge regression from tokens to positions, solved in its dual form: there are fewer frames than features."""
    x = np.asarray(tokens, np.float32).reshape(len(tokens), -1)
    y = np.asarray(positions, np.float32).reshape(len(positions), -1)
    centre, middle = x.mean(axis=0), y.mean(axis=0)
    x = x - centre
    gram = x @ x.T
    gram[np.diag_indices_from(gram)] += RIDGE * gram.trace() / len(gram)
    weights = x.T @ np.linalg.solve(gram, y - middle)
    offset = (middle - centre @ weights).reshape(positions.shape[1:])
    return PositionProbe(jnp.asarray(weights), jnp.asarray(offset))


def sample(
    datasets: Datasets, reference: str, rows: Int[np.ndarray, " e"], count: int, encode: Encode, *, seed: int
) -> tuple[Float[np.ndarray, "n l c"], Float[np.ndarray, "n p d"]]:
    """Tokens and recorded positions of `count` random frames of the given episodes.

    Tokens come from the cache if `datasets` has opened one, else from `encode`. Raises ValueError where there are no
    episodes, or the dataset records no positions.
    """
    if not len(rows):
        raise ValueError(
            f"{reference}: expected training and held-out episodes (ids from, and below, data.val_episodes) for the "
            f"probe of positions, found none of one kind; --distance=tokens needs no probe"
        )
    store, rng = datasets.stores[reference], np.random.default_rng(seed)
    chosen = [(int(row), int(rng.integers(store.lengths[row]))) for row in rng.choice(rows, count)]
    positions = np.stack([store.positions(row)[frame] for row, frame in chosen])
    if reference in datasets.caches:
        tokens = [datasets.tokens(reference, row, np.array([frame]))[0] for row, frame in chosen]
        return np.stack(tokens).astype(np.float32), positions
    frames = np.concatenate([datasets.frames(reference, row, [frame]) for row, frame in chosen])
    return np.concatenate([encode(frames[i : i + BATCH]) for i in range(0, count, BATCH)]), positions


def errors(
    probe: PositionProbe, tokens: Float[np.ndarray, "n l c"], positions: Float[np.ndarray, "n p d"]
) -> Float[np.ndarray, " p"]:
    """Mean distance between what the probe reads and what was recorded, for each body."""
    return np.linalg.norm(np.asarray(probe(jnp.asarray(tokens))) - positions, axis=-1).mean(axis=0)
