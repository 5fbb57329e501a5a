"""A run folder of the release becomes one of ours: with the runs it names, its heads, its recipe; or not at all."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from configs import base
from rlawm_jax.convert.release import module_at
from rlawm_jax.convert.release_run import recipe, release_to_run
from rlawm_jax.convert.runs import REPORT, to_release
from rlawm_jax.models.vit import VARIANTS, VitSpec
from rlawm_jax.training.restore import load_world_model
from rlawm_jax.weights.rules import ConversionError, flat_parameters
from tests.convert.release_tree import FOLDERS, SETTINGS, STEP, write_run
from tests.tiny_models import tiny_config, tiny_world

pytestmark = pytest.mark.slow

BACKBONE = VitSpec("dinov2", 14, 24, 1, 2, 48, False, 0, True, True, True, 1e-6, 4)
KINDS = ("image_decoder", "rla", "denoiser")


@pytest.fixture(scope="module", autouse=True)
def tiny_variant():
    VARIANTS["tiny_run"] = BACKBONE
    yield
    del VARIANTS["tiny_run"]


def config(**overrides):
    """A recipe whose heads, horizon and optimizer differ from the run's."""
    return tiny_config(
        **{"backbone__name": "tiny_run", "backbone__weights": "random:0", "image_decoder__width": 128} | overrides
    )


def world():
    return tiny_world(backbone__name="tiny_run", image_decoder__width=128)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("release")
    for kind in KINDS:
        write_run(kind, root, world(), config())
    return root


@pytest.fixture(scope="module")
def converted(tree, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ours") / "run"
    release_to_run([tree / "runs/weights" / FOLDERS["denoiser"]], output, config(), official=base.get_config())
    return output


@pytest.fixture
def copied(tree, tmp_path) -> Path:
    """A copy of the tree to damage, at another place than config.yaml says."""
    shutil.copytree(tree, tmp_path / "copy")
    return tmp_path / "copy" / "runs" / "weights"


def change(folder: Path, **changes) -> None:
    """Put dotted settings into a run's config.yaml."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        section = settings
        for piece in above:
            section = section.setdefault(piece, {})
        section[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def refused(source, tmp_path: Path, error=ConversionError, given=None) -> str:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        release_to_run(
            [source] if isinstance(source, Path) else source,
            tmp_path / "out",
            given or config(),
            official=base.get_config(),
        )
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def test_one_folder_includes_the_runs_it_was_built_on_with_every_parameter(converted):
    model, _, meta = load_world_model(converted)
    expected = world()
    for path in ("rla.encoder", "rla.decoder", "denoiser", "image_decoder"):
        ours, theirs = flat_parameters(module_at(model, path)), flat_parameters(module_at(expected, path))
        assert all(np.array_equal(ours[leaf], theirs[leaf]) for leaf in theirs), path
    assert meta["trained_parts"] == ["image_decoder", "rla", "denoiser"] and meta["step"] == STEP
    for robot, encoder in model.denoiser.action_encoders.items():
        assert np.all(np.asarray(encoder.scale[...]) == 1), robot  # raw rows


def test_heads_and_training_settings_come_from_config_yaml(converted):
    run = load_world_model(converted)[1]
    assert (run.rla.heads, run.denoiser.heads) == (4, 8)  # the recipe says 2
    assert (run.data.min_horizon, run.data.max_horizon) == (2, 5)  # not the validation's 4 to 5
    assert (run.data.batch_size, run.data.interaction.prob, run.data.horizon_sampling) == (48, 0.9, "beta")
    assert (run.optimizer.learning_rate, run.latent_scale.value, run.train.accumulate) == (1e-4, 10.0, 2)
    assert run.objectives.denoiser.enabled and not run.objectives.rla.enabled
    assert run.data.groups.to_dict() == {
        "ppo": {
            "datasets": ["maniskill/panda_512px:PullCube_v2_success", "maniskill/panda_512px:PullCube_v2_fail"],
            "weight": 1.0,
            "min_start_frame": 0,
        },
        "play": {
            "datasets": [
                f"maniskill/panda_512px:TableOnly_v2_{kind}" for kind in ("pick_and_place", "tool_push", "push_only")
            ],
            "weight": 0.0,
            "min_start_frame": 25,
        },
    }


def test_the_last_action_row_and_the_masks_top_come_from_config_yaml(copied, converted, tmp_path):
    assert not load_world_model(converted)[1].data.last_action  # and without a word of config.yaml, neither
    change(copied / FOLDERS["denoiser"], trainer__directly_use_target_qpos=True, dataset__bg_mask_top=0.25)
    report = release_to_run([copied / FOLDERS["denoiser"]], tmp_path / "run", config(), official=base.get_config())
    run = load_world_model(tmp_path / "run")[1]
    assert run.data.last_action and run.data.mask_top == 0.25 and report["last_action"]
    assert report["taken_from_release"]["data.mask_top"] == "0.25 (dataset.bg_mask_top)"
    change(copied / FOLDERS["denoiser"], trainer__directly_use_target_qpos="yes")
    text = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert "trainer.directly_use_target_qpos: expected true or false, found 'yes'" in text


def test_the_written_recipe_is_the_config_of_the_run(converted):
    spec = importlib.util.spec_from_file_location("converted_config", converted / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(module.get_config().to_json_best_effort()) == json.loads(
        load_world_model(converted)[1].to_json_best_effort()
    )


@pytest.mark.parametrize("name", ['a""" + boom() + """', "a\n    boom()", "a\\", "'\"\udcff"])
def test_any_folder_name_is_text_in_the_written_recipe(name):
    text = recipe(config(), base.get_config(), {"from": [f"runs/{name}/flow_model.pt"], "step": 3})
    module = {"boom": lambda: pytest.fail("the name was run")}
    exec(compile(text.encode(), "config.py", "exec"), module)
    assert module["__doc__"] == f"The recipe of runs/{name}/flow_model.pt (step 3), as its conversion found it."
    assert module["get_config"]().to_dict() == config().to_dict()


def test_the_report_states_the_origin_of_every_setting(converted):
    report = json.loads((converted / f"{REPORT}.json").read_text())
    assert report["taken_from_release"]["denoiser.heads"] == "8 (models.flow_model.args.num_heads)"
    assert report["taken_from_config"] == {"rla.input_mode": "sub", "rla.decoder_only": False}
    assert len(report["from"]) == 4 and set(report["networks"]) == {
        "image_decoder",
        "rla.encoder",
        "rla.decoder",
        "denoiser",
    }
    assert "- denoiser.heads = 8 (models" in (converted / f"{REPORT}.md").read_text()


def test_every_part_converts_back_bit_for_bit(converted, tree, tmp_path):
    for kind, folder in FOLDERS.items():
        to_release(kind, converted, tmp_path / kind)
        for file in (tree / "runs/weights" / folder / "ckpts").iterdir():
            stem = "image_decoder" if kind == "image_decoder" else file.stem.removesuffix(f"_step{STEP:07d}")
            back, original = load_file(tmp_path / kind / f"{stem}_step{STEP:07d}.safetensors"), load_file(file)
            assert back.keys() == original.keys()
            assert all(back[name].tobytes() == original[name].tobytes() for name in original)


def test_an_rla_run_is_converted_alone(tree, tmp_path):
    release_to_run([tree / "runs/weights" / FOLDERS["rla"]], tmp_path / "out", config(), official=base.get_config())
    _, run, meta = load_world_model(tmp_path / "out")
    assert meta["trained_parts"] == ["image_decoder", "rla"]
    assert (run.rla.heads, run.data.max_horizon, run.train.steps) == (4, 100, 1_000_000)
    assert run.data.horizon_sampling == "uniform" and run.objectives.rla.enabled


def test_runs_elsewhere_are_given_after_a_comma(copied, tmp_path):
    (copied / FOLDERS["rla"]).rename(tmp_path / "my_rla")
    text = refused(copied / FOLDERS["denoiser"], tmp_path, FileNotFoundError)
    assert "expected the RLA run that this world model was trained on" in text and "20260323_21-41-25" in text
    report = release_to_run(
        [copied / FOLDERS["denoiser"], tmp_path / "my_rla"], tmp_path / "out", config(), official=base.get_config()
    )
    assert any("my_rla" in file for file in report["from"])


def test_without_config_yaml_the_recipe_gives_the_heads_and_this_is_reported(copied, tmp_path, capsys):
    for kind in KINDS:
        (copied / FOLDERS[kind] / "config.yaml").unlink()
    folders = [copied / FOLDERS[kind] for kind in ("denoiser", "rla")]
    report = release_to_run(folders, tmp_path / "out", config(), official=base.get_config())
    assert report["taken_from_config"]["denoiser.heads"] == report["taken_from_config"]["rla.heads"] == 2
    said = capsys.readouterr().err
    assert "no config.yaml" in said and "config.yaml does not give denoiser.heads: 2 is taken from the recipe" in said


def test_everything_that_contradicts_the_weights_is_named_in_one_report(copied, tmp_path):
    change(
        copied / FOLDERS["denoiser"],
        models__flow_model__args__num_cond_blocks=8,
        models__flow_model__args__num_heads=3,
        models__flow_model__args__robot_qpos_dims={"0": 9},
        models__flow_model__args__use_task_horizon_embedding=True,
        trainer__latent_scalar_normalization=5,
    )
    change(copied / FOLDERS["rla"], models__encoder__args__num_tokens=32, models__decoder__args__num_tokens=32)
    text = refused(copied / FOLDERS["denoiser"], tmp_path)
    for line in (
        "num_cond_blocks: expected 1 (the last block is cond_blocks.0), found 8",
        "denoiser.heads: expected a divisor of the width 16, found 3",
        "robot_qpos_dims: expected {'0': 2, '2': 3}",
        "use_task_horizon_embedding: expected False, the only supported value, found True",
        "latent_scalar_normalization: expected 10.0, the only supported value, found 5",
        "num_tokens: expected 3 (tokens is [3, 16]), found 32",
    ):
        assert line in text


def test_every_damaged_file_of_every_run_is_named_in_one_report(copied, tmp_path):
    files = [file for kind in KINDS for file in sorted((copied / FOLDERS[kind] / "ckpts").iterdir())]
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    text = refused(copied / FOLDERS["denoiser"], tmp_path)
    named = [Path(line.split(": ")[0]).resolve() for line in text.splitlines()]
    assert sorted(named) == sorted(file.resolve() for file in files)


def test_every_bad_tensor_of_every_run_is_named_in_one_report(copied, tmp_path):
    for kind, network in (("rla", "encoder"), ("denoiser", "flow_model")):
        file = copied / FOLDERS[kind] / "ckpts" / f"{network}_step{STEP:07d}.safetensors"
        tensors = load_file(file)
        tensors[next(name for name in tensors if name.endswith("norm_out.bias"))][0] = np.nan
        save_file(tensors, file)
    text = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert "\n  norm_out.bias: holds NaN" in text and "\n  flow_norm_out.bias: holds NaN" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "expected plain YAML"),
        ("- 1\n- 2", "expected settings by name, found list"),
        ("a: !!python/object/apply:os.system ['touch executed']", "expected plain YAML"),
        ("", "expected settings by name, found NoneType"),
        ("a: &a {b: *a}", "found sections without end"),
        ("[" * 5000, "expected plain YAML"),
        ("day: 2020-99-99", "expected plain YAML"),
        ("\n".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]" if i else "k0: &k0 [1]" for i in range(40)), "without end"),
    ],
)
def test_a_damaged_or_unsafe_config_yaml_is_one_line(copied, tmp_path, text, message):
    (copied / FOLDERS["denoiser"] / "config.yaml").write_text(text)
    error = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert message in error and "\n" not in error and not Path("executed").exists()


def test_values_of_another_type_are_named_with_their_place(copied, tmp_path):
    change(copied / FOLDERS["denoiser"], models__flow_model__args__num_heads="many")
    error = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert "models.flow_model.args.num_heads: expected an integer, found 'many'" in error


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("horizon", [5, 2], "dataset.horizon: expected two numbers of frames, 2 or more, in ascending order"),
        ("horizon", 7, "dataset.horizon: expected two numbers of frames"),
        ("bg_mask_top", 1.5, "dataset.bg_mask_top: expected a share in [0, 1), found 1.5"),
        ("groups", {"a": {"paths": 7}}, "dataset.groups.a: expected paths, a weight w, an integer min_start_frame"),
        ("groups", {"a": {"paths": [], "w": "much"}}, "dataset.groups.a: expected paths, a weight w"),
        ("groups", {"a": {"paths": [], "min_start_frame": 0.5}}, "dataset.groups.a: expected paths"),
    ],
)
def test_data_settings_that_make_no_sense_are_named_with_their_place(copied, tmp_path, key, value, message):
    change(copied / FOLDERS["denoiser"], **{f"dataset__{key}": value})
    error = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert message in error and "\n" not in error


def test_two_values_of_one_key_are_named_with_their_places(copied, tmp_path):
    change(copied / FOLDERS["rla"], models__decoder__args__num_heads=8)
    error = refused(copied / FOLDERS["denoiser"], tmp_path)
    assert "expected one value, found 8 at models.decoder" in error and "4 at models.encoder.args.num_heads" in error


def test_a_folder_that_is_not_a_run_and_a_run_given_twice_are_refused(tree, tmp_path):
    run = tree / "runs/weights" / FOLDERS["rla"]
    assert "expected a run folder of the release" in refused(tree, tmp_path, FileNotFoundError)
    assert "expected one rla run" in refused([run, run], tmp_path, ValueError)


def test_paths_of_data_that_is_not_the_releases_leave_the_recipes_groups(copied, tmp_path, capsys):
    settings = copy.deepcopy(SETTINGS["denoiser"])
    settings["dataset"]["groups"] = {"mine": {"paths": ["somewhere/else"]}}
    (copied / FOLDERS["denoiser"] / "config.yaml").write_text(yaml.safe_dump(settings))
    release_to_run([copied / FOLDERS["denoiser"]], tmp_path / "out", config(), official=base.get_config())
    assert "group mine: no dataset matches ['somewhere/else']; the recipe's groups are kept" in capsys.readouterr().err
