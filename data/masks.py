"""Foreground masks: the one place where the background of recorded frames is set to 0.

A frame leaves `EpisodeStore.frames` masked, so that training, cloning, the demonstration bank, the token cache, and
evaluation cannot disagree about what the model sees.
"""

import numpy as np
from jaxtyping import Bool, UInt8


def check_mask_top(top: float, *, has_masks: bool) -> None:
    """Raise ValueError for a share that is none, or for one of masks that the dataset does not have."""
    if not 0 <= top < 1:
        raise ValueError(f"data.mask_top: expected a share in [0, 1), found {top}")
    if top and not has_masks:
        raise ValueError(f"data.mask_top: expected 0 for datasets without masks, found {top}")


def apply_mask(
    frames: UInt8[np.ndarray, "n h w 3"], masks: Bool[np.ndarray, "n h w"] | None, top: float = 0.0
) -> UInt8[np.ndarray, "n h w 3"]:
    """Frames whose background is 0; without masks, the frames as they are.

    The share `top` of a mask's rows, from above, is background whatever the mask says (the release's IWS models).
    """
    if masks is None:
        return frames
    # before the backbone's normalisation, as released: the background is black, not the mean colour
    masked = frames * masks[..., None]
    masked[:, : int(masked.shape[1] * top)] = 0
    return masked
