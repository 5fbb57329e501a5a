"""Map raw rows of actions and states to [-1, 1] and back, by the limits of the training data."""

import numpy as np
from jaxtyping import Float

STILL = 1e-4  # a dimension with a smaller range maps to 0, as in the release's normaliser


def affine_from_limits(
    low: Float[np.ndarray, " a"], high: Float[np.ndarray, " a"]
) -> tuple[Float[np.ndarray, " a"], Float[np.ndarray, " a"]]:
    """(scale, offset) such that raw * scale + offset is -1 at `low` and 1 at `high`, in the precision of the limits.

    A dimension that hardly moves is not stretched: its scale is 1, and `low` maps to 0.
    """
    moving = high - low >= STILL
    scale = np.where(moving, 2.0 / np.where(moving, high - low, 1.0), 1.0)
    return scale, np.where(moving, -1.0 - scale * low, -low)
