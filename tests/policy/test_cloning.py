"""Behaviour cloning: what it learns from, that it learns, what is averaged, and that it resumes exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.datasets import Datasets
from data.episodes import EpisodeStore
from rlawm_jax.policy.actor import Actor
from rlawm_jax.policy.checkpoint import load_policy
from rlawm_jax.policy.cloning import ema_decay, policy_loss, prepare_policy, shifted, validate
from rlawm_jax.policy.observation import decoded, load_observation_model
from rlawm_jax.run_folder.checkpoint import Checkpointer
from rlawm_jax.training.loop import train
from tests.tiny_policy import policy_config, random_policy, shared_world, write_world_model
from tests.tiny_run import LENGTH, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config_of(tiny_root):
    """policy_config on the tiny dataset."""
    where = {"data__root": str(tiny_root), "data__token_root": str(tiny_root / "tokens")}
    return lambda **overrides: policy_config(**where, **overrides)


@pytest.fixture(scope="module")
def world(tiny_root):
    return shared_world(tiny_root)


@pytest.fixture(scope="module")
def bc_rla(config_of, world):
    """A prepared BC + RLA run on decoded pictures: one labelled episode of four."""
    overrides = {"observation": "decoded", "world_model": str(world), "policy__rla__enabled": True}
    return prepare_policy(config_of(**overrides, data__n_labelled=1), world)


def test_training_lowers_the_loss_below_the_mean_of_the_data(config_of, tmp_path):
    run = prepare_policy(config_of(train__steps=400, train__checkpoint_every=400, policy__dropout=0.0), tmp_path)
    train(run, tmp_path)
    losses = [line["policy/loss"] for line in read_metrics(tmp_path)]
    spread = run.data.arrays.actions[run.data.rows_of_labelled()]
    normalised = np.asarray(run.policy().normalise(spread))
    assert np.mean(losses[-10:]) < 0.5 * normalised.var(axis=0).mean() < np.mean(losses[:3])
    assert all(np.isfinite(line["validation/loss"]) for line in read_metrics(tmp_path))
    # what is saved is what is scored
    policy, _ = load_policy(tmp_path)
    for left, right in zip(*(jax.tree.leaves(nnx.state(p)) for p in (policy, run.policy())), strict=True):
        np.testing.assert_array_equal(left, right)
    actor = Actor.load(tmp_path)
    store = EpisodeStore(run.config.data.root, "pusht:demo")
    row = run.data.roles.labelled[0].row  # noise in the background tells its frames from all others
    frames = store.frames(row, range(4))
    labels = np.stack([store.actions(row)[t : t + 3] for t in range(4)])
    chance = np.abs(labels - spread.mean(axis=0)).mean()
    assert np.abs(actor.act(frames) - labels).mean() < 0.7 * chance  # raw units, from raw frames of the full size


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(config_of, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run = prepare_policy(config_of(data__shift=1), whole)
    train(run, whole)
    settings = config_of(data__shift=1)
    first = prepare_policy(settings, halves)
    first.config.unlock()
    first.config.train.steps = 2  # stops early; the schedule is the whole run's
    train(first, halves)
    second = prepare_policy(settings, halves)
    train(second, halves)
    for left, right in zip(*map(jax.tree.leaves, (run.state, second.state)), strict=True):
        np.testing.assert_array_equal(left, right)
    assert read_metrics(whole) == read_metrics(halves)


def test_resuming_with_another_choice_of_episodes_is_refused(config_of, tmp_path):
    train(prepare_policy(config_of(train__steps=2), tmp_path), tmp_path)
    other = prepare_policy(config_of(data__n_labelled=2), tmp_path)
    with pytest.raises(ValueError, match=r"data iterator state: n_labelled: expected 0 as when saved, found 2"):
        train(other, tmp_path)


def test_limits_come_from_labelled_episodes_alone(bc_rla):
    policy, bank = bc_rla.policy(), bc_rla.data.arrays
    rows = bank.actions[bc_rla.data.rows_of_labelled()]
    assert len(rows) == LENGTH
    normalised = np.asarray(policy.normalise(rows))
    np.testing.assert_allclose([normalised.min(0), normalised.max(0)], [[-1, -1], [1, 1]], atol=1e-5)
    watched = slice(LENGTH, 4 * LENGTH)
    assert not bank.actions[watched].any() and bank.actions[4 * LENGTH :].any()


def test_frames_are_those_that_imagination_decodes_at_the_size_of_the_policy(bc_rla):
    observer = load_observation_model(bc_rla.config)
    assert observer is not None
    datasets = Datasets(bc_rla.config.data.root, ["pusht:demo"])
    datasets.open_tokens(bc_rla.config.data.token_root, observer.fingerprint)
    for number, (reference, row) in enumerate(bc_rla.data.roles.all):
        cached = datasets.tokens(reference, row, np.array([2, 7])).astype(np.float32)
        # a bfloat16 step: the backbone in a batch of another size may round to the other side
        encoded = observer.model.encode(jnp.asarray(datasets.frames(reference, row, [2, 7])))
        np.testing.assert_allclose(cached, encoded, rtol=2**-7, atol=1e-3)
        seen = decoded(observer.model, jnp.asarray(cached), 16, "release")
        stored = bc_rla.data.arrays.images[number * LENGTH + np.array([2, 7])] / 255.0
        assert np.asarray(seen).std() > 0.05
        # half a step of uint8, and the rounding of one float32 decoder in batches of two sizes
        np.testing.assert_allclose(stored, seen, atol=0.5 / 255 + 1e-4)


def test_latents_are_of_the_change_over_the_whole_chunk(bc_rla):
    observer = load_observation_model(bc_rla.config)
    assert observer is not None
    store = EpisodeStore(bc_rla.config.data.root, "pusht:demo")
    _, row = bc_rla.data.roles.all[1]
    tokens = observer.model.encode(jnp.asarray(store.frames(row, [5, 9, 10, 11])))
    expected = observer.model.latent(tokens[jnp.array([0, 2])], tokens[jnp.array([1, 3])]).reshape(2, -1)
    # frame 14 does not exist: the last one stands for it
    found = bc_rla.data.arrays.latents[LENGTH + np.array([5, 10])]
    # tokens stored as bfloat16, read through a small transformer
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_a_step_of_bc_and_rla_runs_and_reports_both_heads(bc_rla):
    batch = next(bc_rla.iterator)
    state, metrics = jax.jit(bc_rla.step_fn)(bc_rla.state, bc_rla.frozen, batch)
    weights = bc_rla.config.loss
    total = metrics["policy/action_mse"] + weights.rla_l1 * metrics["policy/latent_l1"]
    np.testing.assert_allclose(
        metrics["policy/loss"], total + weights.rla_mse * metrics["policy/latent_mse"], rtol=1e-5
    )
    assert int(state.step) == 1 and metrics["policy/finite"] == 1 and "validation/loss" in metrics
    share = metrics["policy/latent_mse"] / np.asarray(batch["latents"]).var(axis=0).mean()
    np.testing.assert_allclose(metrics["policy/latent_over_constant"], share, rtol=1e-4)


def test_actions_of_watched_samples_are_never_read():
    config = policy_config(policy__rla__enabled=True)
    policy, rng = random_policy(config), np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
        "actions": rng.normal(size=(4, 4, 2)).astype(np.float32),
        "latents": rng.normal(size=(4, 8)).astype(np.float32),
        "has_actions": np.array([True, False, True, False]),
    }
    loss, metrics = policy_loss(policy, batch, config.loss, None)
    batch["actions"][1::2] = 1e3
    assert policy_loss(policy, batch, config.loss, None)[0] == loss
    alone = {name: value[::2] for name, value in batch.items()}
    # the mean over the samples that have actions; float32 sums in another order
    np.testing.assert_allclose(
        policy_loss(policy, alone, config.loss, None)[1]["action_mse"], metrics["action_mse"], rtol=1e-4
    )
    batch["has_actions"][:] = False
    assert policy_loss(policy, batch, config.loss, None)[1]["action_mse"] == 0


def test_the_average_decays_by_the_published_table():
    steps = jnp.array([0, 1, 2, 3, 11, 10**9])
    expected = [0, 0, 1 - 2**-0.75, 1 - 3**-0.75, 1 - 11**-0.75, 0.9999]
    np.testing.assert_allclose([ema_decay(s, 0.75, 0.9999) for s in steps], expected, rtol=1e-6)


def test_the_first_averages_are_the_parameters_themselves(config_of, tmp_path):
    run = prepare_policy(config_of(), tmp_path)
    step, state = jax.jit(run.step_fn), run.state
    for same in (True, True, False):
        state, _ = step(state, run.frozen, next(run.iterator))
        pairs = zip(*map(jax.tree.leaves, (state.ema, state.params["policy"])), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs) == same


def test_scores_of_answers_without_a_policy_are_what_they_say(config_of, tmp_path):
    run = prepare_policy(config_of(), tmp_path)
    found = validate(run)
    assert found is not None
    policy, bank = run.policy(), run.data.arrays
    target = np.asarray(policy.normalise(bank.actions))[run.data.validation.rows]
    mean = np.asarray(policy.normalise(bank.actions))[run.data.labelled.rows].mean(axis=0)
    # float32 against float64 sums
    np.testing.assert_allclose(found.mean_chunk.value, np.square(mean - target).mean(), rtol=1e-4)
    assert found.policy.clusters == 2 and found.last_action.value > 0
    assert validate(prepare_policy(config_of(data__val_episodes=0), tmp_path)) is None


def test_pictures_are_shifted_by_whole_pixels_within_bounds():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(40, 5, 6, 3)), jnp.float32)
    moved = np.asarray(shifted(images, jax.random.key(0), 1))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    found = set()
    for before, after in zip(padded, moved, strict=True):
        fits = [(i, j) for i in range(3) for j in range(3) if np.array_equal(before[i : i + 5, j : j + 6], after)]
        assert len(fits) == 1
        found.add(fits[0])
    assert len(found) == 9


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"observation": "both"}, ValueError, r"config\.observation: expected one of decoded, raw, found 'both'"),
        ({"observation": "decoded"}, FileNotFoundError, r"config\.world_model: expected a world model's run folder"),
        ({"policy__rla__enabled": True}, FileNotFoundError, r"with checkpoints/ \(for its rla\), found nothing"),
        ({"policy__action_dim": 5}, ValueError, r"config\.policy\.action_dim: expected 2 as in pusht:demo, found 5"),
        ({"data__demonstrations": ()}, ValueError, r"config\.data\.demonstrations: expected at least one"),
        ({"data__batch_size": 3, "mesh__data": 2}, ValueError, r"config\.mesh"),
        ({"ema__max": 1.0}, ValueError, r"config\.ema: expected power > 0 and max in"),
        ({"policy__state_dim": 4}, ValueError, r"config\.policy\.state_dim: expected 0, the width of pusht:demo"),
        ({"data__n_labelled": 9}, ValueError, r"config\.data\.n_labelled: expected 1 to 4"),
    ],
)
def test_what_cannot_be_trained_is_one_line(config_of, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        prepare_policy(config_of(**overrides), tmp_path)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_a_world_model_that_does_not_fit_is_one_line(config_of, world, tiny_root, tmp_path):
    through = {"observation": "decoded", "policy__rla__enabled": True}
    with pytest.raises(ValueError, match=r"config\.policy\.rla\.latent_dim: expected 8, .*\(2 x 4\), found 9"):
        prepare_policy(config_of(**through, world_model=str(world), policy__rla__latent_dim=9), tmp_path)
    blind = write_world_model(tiny_root, tmp_path, **{"objectives.image_decoder.enabled": False})
    with pytest.raises(
        ValueError, match=r"config\.world_model: expected a trained image_decoder in .*, found rla, den"
    ):
        prepare_policy(config_of(**through, world_model=str(blind)), tmp_path)
    assert Checkpointer(blind, read_only=True).steps == [1]
