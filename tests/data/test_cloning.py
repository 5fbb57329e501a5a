"""Training data of policies: chunks at the ends of episodes, labelled episodes, and batches that repeat exactly."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from configs import policy as recipe
from data.cloning import (
    EpisodeArrays,
    EpisodeRef,
    PolicyData,
    PolicyIterator,
    Roles,
    choose_roles,
    chunk_starts,
    chunks_of_episodes,
)

LENGTHS = {"a:demo": [9, 7, 12, 30, 8, 5, 20], "b:play": [6, 11, 3]}


class Store(SimpleNamespace):
    """The part of an EpisodeStore that `choose_roles` uses; ids count from 0."""

    def __init__(self, reference):
        super().__init__(reference=reference, ids=np.arange(len(LENGTHS[reference])))

    def rows(self, val_episodes, validation):
        return np.flatnonzero((self.ids < val_episodes) == validation)


STORES = {name: Store(name) for name in LENGTHS}


def settings(**overrides):
    config = recipe.get_config().data
    config.update({"demonstrations": ("a:demo",), "video": ("a:demo", "b:play"), "val_episodes": 2, "batch_size": 6})
    config.update(overrides)
    return config


def data(roles: Roles, horizon=4, pad_after=2) -> PolicyData:
    """Images that name episode and frame; actions that count frames of all episodes."""
    lengths = [LENGTHS[name][row] for name, row in roles.all]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    images = np.zeros((offsets[-1], 2, 2, 3), np.uint8)
    for number, (begin, end) in enumerate(pairwise(offsets)):
        images[begin:end, ..., 0], images[begin:end, ..., 1] = number, np.arange(end - begin)[:, None, None]
    actions = np.arange(offsets[-1], dtype=np.float32)[:, None]
    return PolicyData(
        EpisodeArrays(offsets, 1, images, actions, None, None), roles, horizon=horizon, pad_after=pad_after
    )


def iterator(with_video=True, share=(0, 1), shards=1, identity=None, **overrides) -> PolicyIterator:
    config = settings(**overrides)
    roles = choose_roles(config, STORES, with_video=with_video)
    return PolicyIterator(data(roles), config, identity or {"x": 1}, shards=shards, share=share)


@pytest.mark.parametrize(
    ("length", "horizon", "pad_after", "starts"),
    [(20, 12, 7, 16), (12, 12, 0, 1), (11, 12, 0, 0), (5, 12, 7, 1), (4, 12, 7, 0), (5, 12, 99, 5), (5, 12, -3, 0)],
)
def test_chunks_start_as_in_the_release(length, horizon, pad_after, starts):
    # METHOD.md 13.9: from 0 to length - horizon + pad_after inclusive, the padding clamped to [0, horizon - 1]
    assert list(chunk_starts(length, horizon, pad_after)) == list(range(starts))


def test_a_chunk_that_reaches_beyond_its_episode_repeats_the_last_row():
    chunks = chunks_of_episodes(np.array([0, 6, 11]), [1], horizon=4, pad_after=2)
    assert list(chunks.first) == [6, 7, 8, 9] and set(chunks.episode) == {1}
    assert chunks.rows.tolist() == [[6, 7, 8, 9], [7, 8, 9, 10], [8, 9, 10, 10], [9, 10, 10, 10]]


def test_chunks_of_every_third_frame_are_among_all_and_keep_their_rows_and_frames():
    offsets = np.array([0, 7, 16])
    all_, some = (chunks_of_episodes(offsets, [0, 1], horizon=3, pad_after=2, every=n) for n in (1, 3))
    assert list(all_.frame) == list(all_.first)
    assert list(some.first) == [0, 3, 6, 7, 10, 13]
    assert list(some.frame) == [0, 1, 2, 3, 4, 5]
    assert some.rows.tolist() == [all_.rows[list(all_.first).index(first)].tolist() for first in some.first]


def test_fewer_labelled_episodes_are_a_subset_and_roles_are_disjoint():
    few, more = (choose_roles(settings(n_labelled=n), STORES, with_video=True) for n in (2, 4))
    assert len(few.labelled) == 2 and set(few.labelled) < set(more.labelled)
    for roles in (few, more):
        assert len(set(roles.all)) == len(roles.all) == 5 + 1 + 2  # a's and b's training episodes, a's held-out ones
        assert set(roles.validation) == {EpisodeRef("a:demo", 0), EpisodeRef("a:demo", 1)}
        assert all(episode.reference == "a:demo" for episode in roles.labelled)
    assert choose_roles(settings(labelled_fraction=0.4), STORES, with_video=True) == few
    assert choose_roles(settings(n_labelled=2), STORES, with_video=False).video == []
    others = {tuple(choose_roles(settings(n_labelled=2, seed=s), STORES, with_video=False).labelled) for s in range(9)}
    assert len(others) > 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"n_labelled": 6},
            r"config\.data\.n_labelled: expected 1 to 5, the training demonstrations of a:demo, found 6",
        ),
        ({"n_labelled": -1}, r"config\.data\.n_labelled: expected 1 to 5, .* found -1"),
        ({"labelled_fraction": 0.0}, r"config\.data\.labelled_fraction: expected a share in \(0, 1\], found 0"),
        ({"labelled_fraction": 0.5, "n_labelled": 2}, r"n_labelled, labelled_fraction: expected one of them"),
        ({"val_episodes": 7}, r"config\.data\.val_episodes: expected demonstrations with ids from 7 on in a:demo"),
    ],
)
def test_settings_that_leave_no_training_data_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=message):
        choose_roles(settings(**overrides), STORES, with_video=True)


def test_episodes_too_short_for_a_chunk_are_refused_if_there_are_no_others():
    roles = Roles([EpisodeRef("b:play", 2)], [], [])
    with pytest.raises(ValueError, match=r"config\.data\.demonstrations: expected an episode of at least 10 frames"):
        data(roles, horizon=12)


def test_a_batch_holds_labelled_chunks_then_video_ones_then_held_out_ones():
    batches = iterator(n_labelled=2)
    labelled = 2
    for _ in range(20):
        batch = next(batches)
        episode = batch["images"][:, 0, 0, 0]
        assert list(batch["has_actions"]) == [True] * 3 + [False] * 3
        assert (episode[:3] < labelled).all() and ((episode[3:] >= labelled) & (episode[3:] < 6)).all()
        assert (batch["validation_images"][:, 0, 0, 0] >= 6).all() and len(batch["validation_images"]) == 1
        # the chunk begins at the frame that was loaded
        begin = batch["actions"][:, 0, 0] - batch["images"][:, 0, 0, 1]
        assert all(len(set(begin[episode == e])) <= 1 for e in set(episode))


def test_every_chunk_is_seen_once_before_any_is_seen_again():
    batches = iterator(with_video=False, batch_size=5)
    count = len(batches._data.labelled)
    seen = np.concatenate([next(batches)["actions"][:, 0, 0] for _ in range(2 * count)])[: 2 * count]
    for one_pass in (seen[:count], seen[count:]):
        assert len(set(one_pass)) == count
    assert list(seen[:count]) != list(seen[count:])


def test_iteration_resumes_where_it_stopped():
    batches = iterator(n_labelled=2)
    for _ in range(7):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    resumed = iterator(n_labelled=2)
    resumed.set_state(state)
    for batch in expected:
        for name, value in next(resumed).items():
            np.testing.assert_array_equal(value, batch[name])


@pytest.mark.parametrize("overrides", [{"seed": 5}, {"n_labelled": 3}, {"batch_size": 8}, {"pad_after": 1}])
def test_a_position_in_other_data_is_refused(overrides):
    state = iterator(n_labelled=2).get_state()
    with pytest.raises(
        ValueError, match=rf"data iterator state: {next(iter(overrides))}: expected .* when saved, found"
    ):
        iterator(**{"n_labelled": 2, **overrides}).set_state(state)


def test_a_position_from_before_the_setting_means_that_frames_were_antialiased():
    older = iterator().get_state()
    as_before, other = (iterator(identity={"x": 1, "resize": resize}) for resize in ("antialias", "release"))
    as_before.set_state(older)
    with pytest.raises(ValueError, match="resize: expected 'antialias' as when saved, found 'release'"):
        other.set_state(older)


def test_processes_feed_the_parts_of_one_batch():
    whole, parts = iterator(batch_size=8, shards=2), [iterator(batch_size=8, shards=2, share=(i, 2)) for i in (0, 1)]
    for _ in range(3):
        batch, halves = next(whole), [next(part) for part in parts]
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), value)


def test_without_video_or_held_out_episodes_a_batch_has_labelled_chunks_only():
    batch = next(iterator(with_video=False, val_episodes=0))
    assert batch["has_actions"].all() and not any(name.startswith("validation_") for name in batch)
