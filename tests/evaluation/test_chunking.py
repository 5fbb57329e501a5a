"""Protocols cut windows as stated, row by row."""

import pytest

from rlawm_jax.evaluation.chunking import ChunkSpan, exact, release, release_iws


@pytest.mark.parametrize("longest", [1, 4, 14])
@pytest.mark.parametrize("last_action", [False, True])
def test_exact_covers_every_interval_once_and_ends_at_the_last_frame(longest, last_action):
    for horizon in range(2, 70):
        pieces, reached = exact(horizon, longest, last_action=last_action), 0
        for piece in pieces:
            assert piece.first == reached and piece.rows == piece.frame - piece.first + last_action
            assert piece.frame - piece.first <= longest
            reached = piece.frame
        assert reached == horizon - 1


@pytest.mark.parametrize("horizon", [5, 15])
def test_up_to_15_frames_the_release_predicts_at_once_with_all_rows_but_the_last(horizon):
    assert release(horizon) == [ChunkSpan(0, horizon - 1, horizon - 1)] == exact(horizon, 14)


def test_the_releases_30_frames_are_27_intervals_in_three_chunks_against_the_30th_frame():
    assert release(30) == [ChunkSpan(0, 9, 9), ChunkSpan(10, 9, 19), ChunkSpan(20, 9, 29)]
    assert sum(piece.rows for piece in release(30)) == 27


def test_the_releases_60_iws_frames_are_four_chunks_of_15_rows():
    assert release_iws(60) == [
        ChunkSpan(0, 15, 14),
        ChunkSpan(15, 15, 29),
        ChunkSpan(30, 15, 44),
        ChunkSpan(45, 15, 59),
    ]


@pytest.mark.parametrize(("cut", "horizon"), [(release, 31), (release_iws, 50)])
def test_a_horizon_that_the_protocol_does_not_have_is_refused_with_the_way_out(cut, horizon):
    with pytest.raises(ValueError, match=f"horizon {horizon}: expected .* use --protocol=exact"):
        cut(horizon)
