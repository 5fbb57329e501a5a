"""From a config to a run: the data's statistics, the token cache, inheritance between stages, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from rlawm_jax.run_folder.checkpoint import CheckpointError
from rlawm_jax.training import restore, setup
from rlawm_jax.training.loop import train
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.training.setup import prepare
from rlawm_jax.world_model import PARTS, WorldModel
from tests.data.conftest import Labelled
from tests.tiny_run import episode, read_metrics, tiny_config

ALONE = {f"objectives.{part}.enabled": False for part in PARTS}


@pytest.fixture(scope="module")
def first_stage(tiny_root, tmp_path_factory):
    """(run, folder) of two steps of the RLA alone."""
    workdir = tmp_path_factory.mktemp("first")
    run = prepare(tiny_config(tiny_root, **ALONE | {"objectives.rla.enabled": True, "train.steps": 2}), workdir)
    train(run, workdir)
    return run, workdir


def second_stage(tiny_root, workdir, **overrides):
    """The config of a denoiser trained on the RLA of `workdir`."""
    stage = {"objectives.denoiser.enabled": True, "objectives.denoiser.start_step": 0, "train.init_from": str(workdir)}
    return tiny_config(tiny_root, **ALONE | stage | overrides)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_checkpoint_is_the_model_again_with_all_it_needs(first_stage):
    run, workdir = first_stage
    model, config, meta = load_world_model(workdir)
    assert config.to_json_best_effort() == run.config.to_json_best_effort()
    assert meta["trained_parts"] == ["rla"] and meta["step"] == 2
    assert set(meta) >= {"command", "git", "versions", "machine", "fingerprint"}
    for left, right in zip(leaves(nnx.state(model.rla)), leaves(run.state.params["rla"]), strict=True):
        np.testing.assert_array_equal(left, right)
    for left, right in zip(leaves(nnx.state(model.denoiser)), leaves(run.frozen["denoiser"]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert model.latent_scale[...] == run.state.latent_scale != run.config.latent_scale.value
    assert model.backbone is None
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint of step 7, found \[2\]"):
        load_world_model(workdir, step=7)


@pytest.mark.slow
def test_a_second_stage_takes_the_trained_rla_and_its_latent_scale(first_stage, tiny_root, tmp_path):
    run, workdir = first_stage
    second = prepare(second_stage(tiny_root, workdir), tmp_path)
    assert set(second.state.params) == {"denoiser"}
    for left, right in zip(leaves(second.frozen["rla"]), leaves(run.state.params["rla"]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert second.state.latent_scale == run.state.latent_scale
    assert second.meta["trained_parts"] == ["rla", "denoiser"]


@pytest.mark.slow
def test_means_and_deviations_per_dimension_are_kept_with_the_model_and_go_on_bit_for_bit(tiny_root, tmp_path):
    def trained(folder, steps: int):
        overrides = {"objectives.rla.enabled": True, "latent_scale.per_dimension": True, "train.steps": steps}
        # one schedule for both lengths
        run = prepare(tiny_config(tiny_root, **ALONE | overrides | {"optimizer.decay": "constant"}), tmp_path / folder)
        train(run, tmp_path / folder)
        return run

    whole, _ = trained("whole", 3), trained("broken", 2)
    resumed = trained("broken", 3)
    for left, right in zip(leaves(resumed.state), leaves(whole.state), strict=True):
        np.testing.assert_array_equal(left, right)
    model, _, _ = load_world_model(tmp_path / "broken")
    assert model.latent_scale[...].shape == (2, 2, 4)
    np.testing.assert_array_equal(model.latent_scale[...], whole.state.latent_scale)


def test_a_second_stage_with_another_kind_of_latent_scale_is_refused(first_stage, tiny_root):
    run, workdir = first_stage
    config = second_stage(tiny_root, workdir, **{"latent_scale.per_dimension": True})
    with pytest.raises(
        ValueError, match=r"^config\.latent_scale\.per_dimension: expected False, as in .*, found True$"
    ):
        restore.inherit_parts(
            WorldModel(config, backbone=None, rngs=nnx.Rngs(0)), config, run.meta["fingerprint"], skip=["denoiser"]
        )


@pytest.mark.parametrize(
    ("overrides", "weights", "message"),
    [
        ({"rla.token_dim": 6}, 0, r"config\.rla: expected the settings of .*'token_dim': 4.*found.*'token_dim': 6"),
        ({}, 1, r"config\.train\.init_from: expected a run on backbone RANDOM-1-x, found RANDOM-0-.*"),
    ],
)
def test_a_second_stage_on_other_sizes_or_another_backbone_is_refused(
    first_stage, tiny_root, overrides, weights, message
):
    run, workdir = first_stage
    fingerprint = run.meta["fingerprint"] if weights == 0 else "RANDOM-1-x"
    with pytest.raises(ValueError, match=message) as error:
        restore.inherit_parts(None, second_stage(tiny_root, workdir, **overrides), fingerprint, skip=["denoiser"])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_going_on_with_another_shape_is_refused(first_stage, tiny_root):
    config = tiny_config(tiny_root, **ALONE | {"objectives.rla.enabled": True, "rla.token_dim": 6, "train.steps": 4})
    with pytest.raises(
        CheckpointError, match=r"state does not fit this config: .* is \(\(4,\), .*expected \(\(6,\)"
    ) as error:
        train(prepare(config, first_stage[1]), first_stage[1])
    assert "\n" not in str(error.value)


def test_evaluating_with_other_backbone_weights_is_refused(first_stage, monkeypatch):
    other = (None, "RANDOM-1-feed")
    monkeypatch.setattr(restore, "load_backbone", lambda *args, **kwargs: other)
    with pytest.raises(
        ValueError, match=r"config\.backbone\.weights: expected the backbone RANDOM-0-.*found RANDOM-1-feed"
    ):
        load_world_model(first_stage[1], with_backbone=True)


def test_actions_are_scaled_to_one_by_the_limits_of_the_training_data(first_stage):
    run, _ = first_stage
    encoder = run.frozen["denoiser"]["action_encoders"]["0"]
    rows = np.concatenate([episode(i).actions[:-1] for i in (1000, 1001, 1002, 1003)])
    scaled = rows * np.asarray(encoder["scale"][...]) + np.asarray(encoder["offset"][...])
    np.testing.assert_allclose([scaled.min(0), scaled.max(0)], [[-1, -1], [1, 1]], atol=1e-5)


@pytest.mark.slow
def test_cached_tokens_train_as_frames_do(first_stage, tiny_root, tmp_path):
    config = tiny_config(
        tiny_root, **ALONE | {"objectives.rla.enabled": True, "train.steps": 2, "data.source": "frames"}
    )
    train(prepare(config, tmp_path), tmp_path)
    cached, computed = read_metrics(first_stage[1]), read_metrics(tmp_path)
    for name in ("rla/loss", "rla/l1", "rla/mse", "rla/copy_l1", "rla/z_std", "latent_scale"):
        # the cache keeps bfloat16, 8 bits: a token is off by up to 2^-9 of its size, a mean over tokens by less
        np.testing.assert_allclose([c[name] for c in computed], [c[name] for c in cached], rtol=2**-9, err_msg=name)


@pytest.mark.slow
def test_preparing_again_computes_no_tokens_and_writes_nothing_to_the_run_folder(first_stage, tiny_root, tmp_path):
    files = sorted((tiny_root / "tokens").rglob("*.array_record"))
    before = [path.stat().st_mtime_ns for path in files]
    assert files
    prepare(tiny_config(tiny_root, **ALONE | {"objectives.rla.enabled": True}), tmp_path / "run")
    assert [path.stat().st_mtime_ns for path in files] == before
    assert not (tmp_path / "run").exists()


class OtherRobot(Labelled, skip_registration=True):
    """Robot 3, of which the recipe knows nothing."""

    name = "other"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh.fsdp": 3}, r"config\.mesh: data="),
        ({"data.source": "video"}, r"data\.source: expected one of .* found 'video'"),
        (
            {"data.root": "/nowhere"},
            r"expected a built dataset in /nowhere/pusht, found none; build it: python -m data.build",
        ),
        ({"dtype": "half"}, r"config\.dtype: expected one of"),
        ({"sampler.solver": "rk4"}, r"config\.sampler\.solver: expected one of"),
        ({"backbone.image_size": 56}, r"config\.backbone\.image_size: expected 28 as in the frames of pusht:"),
        ({"backbone.weights": ""}, r"no weights at ''"),
        ({"backbone.name": "dinov9"}, r"dinov9"),
        ({"optimizer.decay": "linear"}, r"config\.optimizer\.decay: expected one of"),
        ({"objectives.rla.stop_step": -1}, r"config\.objectives\.rla: expected 0 <= start_step < stop_step"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_value_is_one_line_that_names_its_field(first_stage, tiny_root, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError, CheckpointError), match=message) as error:
        prepare(tiny_config(tiny_root, **overrides), tmp_path)
    assert "\n" not in str(error.value)


def test_files_and_statistics_that_do_not_exist_are_one_line_too(tiny_root):
    with pytest.raises(CheckpointError, match="/nowhere: expected a run folder with checkpoints/, found none"):
        restore.inherit_parts(None, second_stage(tiny_root, "/nowhere"), "f", skip=["denoiser"])
    with pytest.raises((ValueError, FileNotFoundError), match=r"/nowhere\.safetensors"):
        setup.set_lpips(None, tiny_config(tiny_root, lpips_weights="/nowhere.safetensors"), True)
    config = tiny_config(tiny_root, **{"data.action_statistics": "std"})
    with pytest.raises(ValueError, match=r"config\.data\.action_statistics: expected one of .* found 'std'"):
        setup.set_action_statistics(None, config, None)


def test_a_robot_without_an_action_encoder_is_refused(tiny_root, tmp_path):
    others = [dataclasses.replace(episode(i), robot_id=3) for i in (1000, 1001)]
    OtherRobot(others, data_dir=tmp_path).download_and_prepare()
    config = tiny_config(tmp_path)
    config.data.groups.play.datasets = config.data.groups.demo.datasets = ("other:play",)
    with pytest.raises(
        ValueError, match=r"config\.denoiser\.action_dims: expected an entry for each robot of other:play"
    ):
        prepare(config, tmp_path)
