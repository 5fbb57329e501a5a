"""What a dataset says about itself: where its positions appear in its frames, and which action holds still.

Two optional keys of a built dataset's `metadata.json`. Its builder writes them; added by hand they work as well, as
neither the index nor a token cache depends on them.

    "projection": {"matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "effector_radius": 0.03, "object_radius": 0.15}
    "hold_still": "state"

`matrix` [3, d+1] takes a position in the dataset's length unit, with a 1 appended, to (x w, y w, w). x runs from 0 at
the frame's left edge to 1 at its right, y from 0 at the top to 1 at the bottom, and w > 0 is in front of the camera.
The radii, in frame widths, say how far from its position the effector or an object is visible (objects: one number, or
one for each). `hold_still` is "state" where actions are targets in the units of the first columns of the state, which
then hold still when repeated, and "zeros" where actions are velocities or differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

HOLD_STILL = ("state", "zeros")
FIELDS = ("matrix", "effector_radius", "object_radius")


@dataclass(frozen=True)
class Projection:
    """A fixed camera: where positions appear in the frame, and how large what is there looks, in frame widths."""

    matrix: Float[np.ndarray, "3 e"]
    effector_radius: float
    object_radius: float | tuple[float, ...]

    def near(
        self, effector: Float[np.ndarray, "n d"], objects: Float[np.ndarray, "n o d"], grid: tuple[int, int]
    ) -> Bool[np.ndarray, "n l"]:
        """The patches of a grid (rows, columns) that the effector or an object may cover, row by row."""
        points = self.place(np.concatenate([effector[:, None], objects], axis=1))[:, :, None]
        radii = np.concatenate([[self.effector_radius], np.broadcast_to(self.object_radius, objects.shape[1])])
        rows, columns = grid
        middles = np.stack(np.meshgrid((np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows), axis=-1)
        beyond = np.abs(points - middles.reshape(-1, 2)) - 0.5 / np.array([columns, rows])
        # NaN, behind the camera, compares as false
        return (np.linalg.norm(np.maximum(beyond, 0), axis=-1) <= radii[:, None]).any(axis=1)

    def place(self, positions: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "... 2"]:
        """Positions as (x, y) in the frame, where it spans 0 to 1; NaN behind the camera."""
        ones = np.ones((*positions.shape[:-1], 1))
        image = np.concatenate([positions, ones], axis=-1) @ self.matrix.T
        depth = np.where(image[..., 2:] > 0, image[..., 2:], np.nan)
        return image[..., :2] / depth


def from_clip(clip: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "3 4"]:
    """The `matrix` of an OpenGL camera: `clip` is its projection matrix times its view matrix, for column vectors.

    OpenGL's x and y run from -1 to 1, with y upwards. PyBullet returns both matrices column by column: transpose them.
    """
    x, y, _, w = np.asarray(clip, np.float64)
    return np.stack([(x + w) / 2, (w - y) / 2, w])


@dataclass(frozen=True)
class Description:
    """The optional keys of a dataset's metadata; None where it does not say."""

    projection: Projection | None = None
    hold_still: str | None = None


def read_description(metadata: Mapping[str, Any] | None, path: Path, widths: Mapping[str, int]) -> Description:
    """The keys in `metadata`, checked; `widths` are those of the fields that the dataset in `path` has.

    Raises ValueError in one line if a key does not fit.
    """
    given = metadata or {}
    hold_still = given.get("hold_still")
    if hold_still is not None and hold_still not in HOLD_STILL:
        raise ValueError(
            f"{path / 'metadata.json'}: hold_still: expected one of {', '.join(HOLD_STILL)}, found {hold_still!r}; "
            f"correct it or remove the key"
        )
    if hold_still == "state" and widths.get("state", 0) < widths["actions"]:
        raise ValueError(
            f"{path / 'metadata.json'}: hold_still: expected a dataset with a state of {widths['actions']} or more "
            f"columns, found {widths.get('state', 'none')}; remove the key"
        )
    projection = given.get("projection")
    position_dim = widths.get("effector_position")
    return Description(None if projection is None else _projection(projection, path, position_dim), hold_still)


def _projection(given: Any, path: Path, position_dim: int | None) -> Projection:
    where = f"{path / 'metadata.json'}: projection"
    if position_dim is None:
        raise ValueError(f"{where}: expected a dataset with positions, found none; record them or remove the key")
    try:
        matrix = np.asarray(given["matrix"], np.float64)
        effector, objects = float(given["effector_radius"]), np.asarray(given["object_radius"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected {', '.join(FIELDS)} as numbers, found {given!r}; see data/description.py"
        ) from error
    if matrix.shape != (3, position_dim + 1) or not np.isfinite(matrix).all():
        raise ValueError(
            f"{where}: matrix: expected 3 rows of {position_dim + 1} finite numbers for positions of {position_dim} "
            f"coordinates, found shape {matrix.shape}; see data/description.py"
        )
    return Projection(matrix, effector, tuple(objects.tolist()) if objects.ndim else float(objects))
