"""Masks: what is background is 0 whatever was there, what is not stays as it is."""

import numpy as np

from data.masks import apply_mask

FRAMES = np.random.default_rng(0).integers(1, 256, (3, 8, 6, 3), np.uint8)
MASKS = np.random.default_rng(1).random((3, 8, 6)) < 0.5


def test_the_background_becomes_zero_and_the_foreground_is_unchanged():
    masked = apply_mask(FRAMES, MASKS)
    assert masked.dtype == np.uint8 and not masked[~MASKS].any()
    np.testing.assert_array_equal(masked[MASKS], FRAMES[MASKS])
    np.testing.assert_array_equal(masked, apply_mask(np.where(MASKS[..., None], FRAMES, 255 - FRAMES), MASKS))


def test_the_top_share_of_rows_is_background_even_inside_the_mask():
    masked = apply_mask(FRAMES, MASKS, top=0.3)  # int(8 x 0.3) rows
    assert not masked[:, :2].any()
    np.testing.assert_array_equal(masked[:, 2:], apply_mask(FRAMES, MASKS)[:, 2:])


def test_without_masks_frames_are_unchanged():
    assert apply_mask(FRAMES, None, top=0.3) is FRAMES
