"""What the training log says of held-out windows: right values, at the right steps, at no cost to the run itself."""

import json

import jax
import numpy as np
import pytest

from data.pipeline import WindowLoader
from data.windows import other_windows
from rlawm_jax.run_folder.logging import METRICS_FILE
from rlawm_jax.training.held_out import HeldOut
from rlawm_jax.training.loop import train
from rlawm_jax.training.setup import prepare
from rlawm_jax.training.state import join_model
from tests.tiny_run import tiny_config

RECIPE = {"objectives.image_decoder.enabled": False, "optimizer.decay": "constant", "train.validate_every": 1}


def start(root, workdir, **overrides):
    return prepare(tiny_config(root, **RECIPE | overrides), workdir)


def measured(workdir) -> dict[int, dict[str, float]]:
    """The values of val/ by step."""
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    return {line["step"]: line for line in lines if any(name.startswith("val/") for name in line)}


def shaken(run):
    """The run's state with noise on its parameters: after few steps the outputs hardly depend on the inputs."""
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), run.state.params)
    return run.state._replace(params=noisy)


@pytest.fixture(scope="module")
def unbroken(tiny_root, tmp_path_factory):
    """(run, folder) of four steps, of which the denoiser trains in the last two."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run = start(tiny_root, workdir)
    train(run, workdir)
    return run, workdir


def test_nothing_is_said_before_the_denoiser_trains_and_then_as_often_as_asked(unbroken):
    run, workdir = unbroken
    assert list(measured(workdir)) == [3, 4]
    run.validation.every = 3
    assert [step for step in range(1, 10) if run.validate(step)] == [3, 6, 9]
    run.validation.every = 1


def test_the_run_is_the_same_bit_for_bit_as_without_and_in_two_parts(unbroken, tiny_root, tmp_path):
    run, workdir = unbroken
    for steps in (3, 4):
        broken = start(tiny_root, tmp_path / "broken", **{"train.steps": steps})
        train(broken, tmp_path / "broken")
    silent = start(tiny_root, tmp_path / "silent", **{"train.validate_every": 0})
    train(silent, tmp_path / "silent")
    assert measured(tmp_path / "silent") == {}
    assert measured(tmp_path / "broken") == measured(workdir)
    for other in (broken, silent):
        for left, right in zip(jax.tree.leaves(run.state), jax.tree.leaves(other.state), strict=True):
            np.testing.assert_array_equal(left, right)


def test_the_shares_are_those_of_copying_and_of_the_true_latent_on_held_out_windows(unbroken):
    run, workdir = unbroken
    config, step = run.config, run.config.train.steps
    loader = WindowLoader(config.data, fingerprint=run.meta["fingerprint"])
    windows = loader.validation_windows(config.eval.chunk, 64, seed=config.eval.seed, at_most=True)
    windows = windows[: len(windows) // config.data.batch_size * config.data.batch_size]
    assert windows and all(loader.store_of(w).episode_ids[w.episode] < config.data.val_episodes for w in windows)
    s0, s1 = np.stack([loader.load_window(w, [0, w.horizon - 1])["tokens"] for w in windows], axis=1).astype(np.float32)
    model = join_model(run.validation.function.args[0], run.state.params, run.frozen, run.state.latent_scale)
    ceiling = np.abs(np.asarray(model.apply_latent(s0, model.latent(s0, s1))) - s1).mean()
    found = measured(workdir)[step]
    np.testing.assert_allclose(found["val/reconstruction_over_copy"], ceiling / np.abs(s1 - s0).mean(), rtol=1e-4)


def test_the_actions_compared_with_are_another_windows(unbroken):
    run, _ = unbroken
    loader = WindowLoader(run.config.data, fingerprint=run.meta["fingerprint"])
    windows = loader.validation_windows(run.config.eval.chunk, 64, seed=run.config.eval.seed, at_most=True)
    others = other_windows(windows, [0] * len(windows), seed=run.config.eval.seed)
    batch = jax.device_get(run.validation.batches[0])
    rows = run.config.eval.chunk - 1
    for i in range(len(batch["actions"])):
        np.testing.assert_array_equal(batch["actions"][i, :rows], loader.actions(windows[i], rows))
        np.testing.assert_array_equal(batch["anothers"][i, :rows], loader.actions(others[i], rows))


def test_a_model_that_ignores_its_actions_is_seen(unbroken):
    run, _ = unbroken
    state = shaken(run)
    found = run.validation(4, state, run.frozen)
    difference = found["val/own_over_copy"] - found["val/anothers_over_copy"]
    assert abs(difference) > 1e-4
    np.testing.assert_allclose(found["val/own_minus_anothers_over_copy"], difference, atol=1e-6)
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "action_encoders" in jax.tree_util.keystr(path) else x, state.params
    )
    found = run.validation(4, state._replace(params=flat), run.frozen)
    assert found["val/own_minus_anothers_over_copy"] == 0 < found["val/own_over_copy"]


@pytest.mark.slow
def test_frames_give_what_cached_tokens_do(unbroken, tiny_root, tmp_path):
    run, _ = unbroken
    frames, state = start(tiny_root, tmp_path, **{"data.source": "frames"}), shaken(run)
    found, cached = (each.validation(4, state, each.frozen) for each in (frames, run))
    for name, value in cached.items():  # the cache keeps bfloat16
        np.testing.assert_allclose(found[name], value, atol=2**-7, err_msg=name)


def test_without_held_out_windows_it_says_so_once_and_nothing_more(unbroken, capsys):
    run, _ = unbroken
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.val_episodes = 0
    loader = WindowLoader(config.data, fingerprint=run.meta["fingerprint"])
    silent = HeldOut(config, run.validation.function.args[0], loader, run.mesh)
    assert "no held-out windows" in capsys.readouterr().err
    assert silent(4, run.state, run.frozen) == {}
