"""Evaluation against a toy world whose errors can be written down by hand."""

import json

import numpy as np
import pytest

from data.windows import other_windows
from rlawm_jax.evaluation.chunking import balanced_chunks
from rlawm_jax.evaluation.open_loop import OpenLoop, evaluate, evaluation_windows, total_windows
from rlawm_jax.evaluation.results import (
    ANOTHERS,
    CEILING,
    COPY,
    MEAN,
    MEAN_LATENT,
    RANDOM_MEAN,
    RANDOM_SINGLE,
    SINGLE,
    STILL,
    format_table,
    own_or_anothers,
)
from rlawm_jax.evaluation.statistics import ClusterBootstrap
from tests.toy_world import ToyLoader, ToyModel, toy_config


def open_loop(model=None, loader=None, *, images=False, **overrides):
    return OpenLoop(model or ToyModel(), toy_config(**overrides), loader or ToyLoader(), images=images)


@pytest.fixture(scope="module")
def perfect():
    return open_loop(images=True)


@pytest.fixture(scope="module")
def noisy():
    return open_loop(ToyModel(noise_scale=0.2))


@pytest.mark.parametrize("longest", [1, 7, 14])
def test_chunks_add_up_and_are_as_few_and_as_equal_as_possible(longest):
    for intervals in range(1, 60):
        rows = balanced_chunks(intervals, longest)
        assert sum(rows) == intervals
        assert len(rows) == np.ceil(intervals / longest)
        assert max(rows) <= longest and max(rows) - min(rows) <= 1


def test_a_perfect_model_has_no_error_over_several_chunks(perfect):
    errors = perfect.measure(evaluation_windows(perfect, 9), images=True)[-1]
    for row in (SINGLE, MEAN):
        np.testing.assert_allclose(errors[row]["dino_l1"], 0, atol=1e-6)
        np.testing.assert_allclose(errors[row]["dino_l1_changed"], 0, atol=1e-6)
        np.testing.assert_allclose(errors[row]["ssim"], 1, atol=1e-4)
        assert (errors[row]["psnr"] > 80).all()  # float32 rounding is all that is left


def test_copy_and_ceiling_rows_are_their_definitions():
    loader = ToyLoader()
    loop = open_loop(loader=loader, changed_threshold=0.01)
    windows = evaluation_windows(loop, 9)
    errors = loop.measure(windows, images=False)[-1]
    first = np.stack([loader.tokens[w.episode, w.start] for w in windows])
    last = np.stack([loader.tokens[w.episode, w.start + 8] for w in windows])
    change = np.abs(last - first)
    np.testing.assert_allclose(errors[COPY]["dino_l1"], change.mean(axis=(1, 2)), atol=1e-6)
    changed = [x[x.mean(axis=1) > 0.01].mean() if (x.mean(axis=1) > 0.01).any() else np.nan for x in change]
    assert 0 < np.isnan(changed).sum() < len(changed)  # both kinds of window occur
    np.testing.assert_allclose(errors[COPY]["dino_l1_changed"], changed, atol=1e-6)
    ceiling = np.abs(first + (last - first).mean(axis=(1, 2), keepdims=True) - last).mean(axis=(1, 2))
    np.testing.assert_allclose(errors[CEILING]["dino_l1"], ceiling, atol=1e-6)


def test_single_sample_is_the_mean_error_and_the_mean_row_the_error_of_the_mean(noisy):
    windows = evaluation_windows(noisy, 4)[:5]
    errors = noisy.measure(windows, images=False)[-1]
    batch = noisy.load(windows, images=False)
    draws = np.stack([noisy.roll(batch, i)[0][-1] for i in range(3)])
    truth = np.asarray(batch.truth[-1])
    np.testing.assert_allclose(errors[SINGLE]["dino_l1"], np.abs(draws - truth).mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(errors[MEAN]["dino_l1"], np.abs(draws.mean(0) - truth).mean(axis=(1, 2)), rtol=1e-5)
    assert errors[MEAN]["dino_l1"].mean() < errors[SINGLE]["dino_l1"].mean()
    latent = np.abs(draws - truth).mean(axis=(0, 2, 3))  # the toy's latent is the mean change
    np.testing.assert_allclose(errors[SINGLE]["latent_l1"], latent, rtol=1e-4)


def test_random_rows_are_the_decoder_with_plain_noise_and_know_no_action(perfect):
    windows = evaluation_windows(perfect, 9)[:5]
    errors = perfect.measure(windows, images=False)[-1]
    batch = perfect.load(windows, images=False)
    draws = np.stack([perfect.roll_random(batch, i)[-1] for i in range(3)])
    truth = np.asarray(batch.truth[-1])
    np.testing.assert_allclose(errors[RANDOM_SINGLE]["dino_l1"], np.abs(draws - truth).mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        errors[RANDOM_MEAN]["dino_l1"], np.abs(draws.mean(0) - truth).mean(axis=(1, 2)), rtol=1e-5
    )
    still = batch._replace(chunks=batch.chunks._replace(actions=batch.chunks.actions * 0))
    np.testing.assert_array_equal(perfect.roll_random(still, 0), perfect.roll_random(batch, 0))
    assert errors[RANDOM_MEAN]["dino_l1"].min() > 0.01 > errors[MEAN]["dino_l1"].max()


def test_the_model_is_also_asked_with_another_windows_actions_and_with_ones_that_hold_still(noisy):
    windows = evaluation_windows(noisy, 9)
    errors = noisy.measure(windows, images=False)[-1]
    others = other_windows(windows, [0] * len(windows), seed=7)
    for windows_of_a_batch, own in ((slice(0, 5), windows[:5]), (slice(5, 10), windows[5:10])):
        batch = noisy.load(own, images=False, others=others[windows_of_a_batch])
        truth = np.asarray(batch.truth[-1])
        for row, actions in (
            (ANOTHERS, noisy.load(others[windows_of_a_batch], images=False).chunks.actions),
            (STILL, -1),
        ):
            chunks = batch.chunks._replace(actions=actions + 0 * batch.chunks.actions)
            # the noise is that of the windows themselves
            draws = np.stack([noisy.roll(batch._replace(chunks=chunks), i)[0][-1] for i in range(3)])
            expected = np.abs(draws.mean(0) - truth).mean(axis=(1, 2))
            np.testing.assert_allclose(errors[row]["dino_l1"][windows_of_a_batch], expected, rtol=1e-5)
    assert errors[ANOTHERS]["dino_l1"].mean() > errors[MEAN]["dino_l1"].mean()


def test_own_minus_anothers_is_paired_and_separates_a_model_that_uses_its_actions_from_one_that_does_not():
    loop, deaf = open_loop(ToyModel(noise_scale=0.02)), open_loop(Deaf(noise_scale=0.02))
    obedient, ignorant = (evaluate(each).table[-1] for each in (loop, deaf))
    errors = loop.measure(evaluation_windows(loop, 9), images=False)[-1]
    difference = errors[MEAN]["dino_l1"] - errors[ANOTHERS]["dino_l1"]
    found = obedient.own_minus_anothers
    np.testing.assert_allclose(found.metrics["dino_l1"].value, difference.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        found.ratios["dino_l1"].value, difference.sum() / errors[COPY]["dino_l1"].sum(), rtol=1e-6
    )
    assert found.metrics["dino_l1"].high < 0 and "lower than with another" in own_or_anothers(obedient, "dino_l1")
    assert ignorant.own_minus_anothers.metrics["dino_l1"].value == pytest.approx(0, abs=1e-9)
    assert "not told apart" in own_or_anothers(ignorant, "dino_l1")


class Deaf(ToyModel):
    """A model that ignores its actions."""

    def predict(self, tokens, actions, num_actions, robot_id, noise, sampler):
        return super().predict(tokens, 0 * actions, 0 * num_actions, robot_id, noise, sampler)


def test_moving_patches_are_those_that_the_data_names_at_each_chunks_end(perfect):
    windows = evaluation_windows(perfect, 9)
    for mark, errors in zip((3, 6, 8), perfect.measure(windows, images=False), strict=True):
        for window, found in zip(windows, errors[COPY]["dino_l1_moving"], strict=True):
            first, last = perfect.loader.tokens[window.episode, [window.start, window.start + mark]]
            change = np.abs(last - first).mean(axis=1)
            np.testing.assert_allclose(found, change[change > 0].mean(), rtol=1e-4)


def test_data_that_says_nothing_has_no_moving_column_and_no_row_that_holds_still():
    result = evaluate(open_loop(loader=ToyLoader(described=False))).table[-1]
    assert STILL not in result.rows and ANOTHERS in result.rows
    assert not any("dino_l1_moving" in row.metrics for row in result.rows.values())
    assert "moving patches" not in format_table(evaluate(open_loop(loader=ToyLoader(described=False), horizons=(4,))))


def test_the_mean_latent_is_the_mean_over_the_windows_and_latent_errors_are_shares_of_its_error(noisy):
    windows = evaluation_windows(noisy, 9)
    tokens = np.stack([noisy.loader.tokens[w.episode, w.start + np.array([0, 3, 6, 8])] for w in windows], axis=1)
    latents = np.diff(tokens, axis=0).mean(axis=(2, 3))  # the toy's latent is the mean change
    errors = noisy.measure(windows, images=False)
    guess = tokens[0] + latents.mean(axis=1).sum()
    np.testing.assert_allclose(
        errors[-1][MEAN_LATENT]["dino_l1"], np.abs(guess - tokens[-1]).mean(axis=(1, 2)), rtol=1e-4
    )
    constant = np.abs(latents[0] - latents[0].mean())
    np.testing.assert_allclose(errors[0][MEAN_LATENT]["latent_l1"], constant, rtol=1e-3, atol=1e-6)
    rows = evaluate(noisy).table[0].rows
    share = rows[MEAN].metrics["latent_l1"].value / rows[MEAN_LATENT].metrics["latent_l1"].value
    assert rows[MEAN].ratios["latent_l1"].value == pytest.approx(share)
    assert "latent_l1" not in rows[MEAN_LATENT].ratios and "dino_l1" in rows[MEAN_LATENT].ratios


def test_latent_error_exists_for_the_first_chunk_only(noisy):
    first, second, third = noisy.measure(evaluation_windows(noisy, 9), images=False)
    assert "latent_l1" in first[SINGLE]
    assert "latent_l1" not in second[SINGLE] and "latent_l1" not in third[SINGLE]


def test_noise_follows_the_window_and_not_its_place_in_the_batch(noisy):
    large = open_loop(ToyModel(noise_scale=0.2), batch_size=12)
    windows = evaluation_windows(noisy, 9)
    expected = noisy.measure(windows, images=False)[-1][SINGLE]["dino_l1"]
    backwards = large.measure(windows[::-1], images=False)[-1][SINGLE]["dino_l1"]
    np.testing.assert_allclose(backwards[::-1], expected, rtol=1e-5)
    assert len(np.unique(expected)) == len(windows)


def test_windows_without_change_leave_the_changed_column_and_are_counted():
    loop = open_loop(loader=ToyLoader(episodes=6, still=(0, 1)), horizons=(4,))
    for result in evaluate(loop).table:
        copy = result.rows[COPY].metrics
        assert (copy["dino_l1"].count, copy["dino_l1"].clusters) == (12, 6)
        assert (copy["dino_l1_changed"].count, copy["dino_l1_changed"].clusters) == (8, 4)


def test_evaluation_reports_every_horizon_and_a_rising_copy_curve_and_is_json_and_repeatable(perfect):
    seen = []
    evaluation = evaluate(perfect, progress=seen.append)
    assert sum(seen) == total_windows(perfect)
    assert [(r.intervals, r.chunks) for r in evaluation.table] == [(3, [3]), (8, [3, 3, 2])]
    assert [r.intervals for r in evaluation.curve] == [1, 2, 3, 6, 8]
    copy = [r.rows[COPY].metrics["dino_l1"].value for r in evaluation.curve]
    assert (np.diff(copy) > 0).all()
    assert evaluation.table[-1].rows[MEAN].ratios["dino_l1"].value < 1e-4
    assert evaluate(perfect) == evaluation
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert data["table"][0]["rows"]["copy"]["metrics"]["ssim"]["count"] == 12
    text = format_table(evaluation)
    assert "h = 9 frames (8 intervals, 3 predictions), 12 windows of 6 episodes" in text
    assert "bootstrap over episodes" in text and "mean of 3" in text


def test_unusable_settings_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"config\.eval\.chunk: expected at most 6 frames"):
        open_loop(chunk=8)
    with pytest.raises(ValueError, match="expected a loader with frames"):
        open_loop(loader=ToyLoader(with_frames=False), images=True)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [10, 30])
def test_the_interval_covers_the_mean_of_clustered_values_about_95_times_in_100(clusters):
    rng = np.random.default_rng(0)
    membership = np.repeat(np.arange(clusters), 10)
    hits = naive_hits = 0
    for trial in range(300):
        values = rng.standard_normal(clusters)[membership] + rng.standard_normal(clusters * 10)
        found = ClusterBootstrap(membership, seed=trial, draws=500).mean(values)
        naive = ClusterBootstrap(np.arange(clusters * 10), seed=trial, draws=500).mean(values)
        hits += found.low <= 0 <= found.high
        naive_hits += naive.low <= 0 <= naive.high
    # 300 trials: a standard error of 1.3 %; redrawing windows instead of episodes is plainly wrong
    assert 0.90 <= hits / 300 <= 0.985
    assert naive_hits / 300 < 0.7


def test_ratios_are_paired_and_ignore_values_that_do_not_exist():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(1, 5, 40)
    values = 0.8 * baseline
    values[3], baseline[7] = np.nan, np.nan
    found = ClusterBootstrap(np.repeat(np.arange(10), 4), seed=0).ratio(values, baseline)
    np.testing.assert_allclose([found.value, found.low, found.high], 0.8, rtol=1e-9)
    assert (found.count, found.clusters) == (38, 10)


def test_one_episode_alone_has_a_mean_and_no_interval():
    found = ClusterBootstrap(np.zeros(5, int), seed=0).mean(np.arange(5.0))
    assert found.value == 2.0 and np.isnan([found.low, found.high]).all()
    assert ClusterBootstrap(np.zeros(2, int), seed=0).mean(np.full(2, np.nan)) is None
