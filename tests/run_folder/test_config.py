"""Configs from checkpoints: old ones behave as they did, and a new field must state how."""

import pytest
from ml_collections import ConfigDict

from configs import base, policy, pusht
from rlawm_jax.run_folder.config import POLICY, WORLD_MODEL, config_from_meta

OPEN = ("data.groups", "denoiser.action_dims")  # sections whose keys are names of datasets and robots
KINDS = pytest.mark.parametrize(("recipe", "fields"), [(base, WORLD_MODEL), (policy, POLICY)])


def names(config: ConfigDict, whole: tuple[str, ...], prefix: str = "") -> set[str]:
    """Dotted names of all fields; sections named in `whole` count as one."""
    fields = set()
    for key, value in config.items():
        name = prefix + key
        fields |= names(value, whole, f"{name}.") if isinstance(value, ConfigDict) and name not in whole else {name}
    return fields


def without(config: ConfigDict, field: str) -> ConfigDict:
    *above, last = field.split(".")
    section = config
    for key in above:
        section = section[key]
    del section[last]
    return config


def load(config: ConfigDict) -> ConfigDict:
    return config_from_meta({"config": config.to_json_best_effort(), "git": "v0"})


@KINDS
def test_every_field_is_in_the_first_checkpoints_or_has_a_value_that_keeps_old_ones_unchanged(recipe, fields):
    first = set(fields.first_names())
    assert len(first) == len(fields.first_names()) and not first & fields.added.keys()
    assert names(recipe.get_config(), (*OPEN, *fields.added)) == first | fields.added.keys()


@KINDS
def test_a_checkpoint_without_any_later_field_loads_with_the_values_it_behaved_by(recipe, fields, capsys):
    config, expected = recipe.get_config().unlock(), recipe.get_config()
    if recipe is base:
        expected.objectives.image_decoder.lr_scale = 1.0  # today's default came with the field
        expected.train.validate_every = 0  # likewise: older runs logged nothing of held-out windows
    else:
        expected.policy.resize = "antialias"  # likewise
    for field in fields.added:
        without(config, field)
    loaded = load(config)
    assert loaded.to_json_best_effort(sort_keys=True) == expected.to_json_best_effort(sort_keys=True)
    log = capsys.readouterr().err
    assert log.count("\n") == 1 and all(f" {name}={value}" in log for name, value in fields.added.items())


@pytest.mark.parametrize(("recipe", "field"), [(base, "rla.num_tokens"), (base, "eval"), (policy, "policy.rla.heads")])
def test_a_config_without_a_field_that_every_checkpoint_has_is_refused_in_one_line(recipe, field):
    with pytest.raises(ValueError, match=rf"^config of the checkpoint: expected {field}.* found nothing.*\(v0\)$"):
        load(without(recipe.get_config().unlock(), field))


def test_fields_newer_than_a_checkpoint_get_their_defaults_and_are_reported(capsys):
    config = pusht.get_config("debug").unlock()
    expected = config.to_dict()
    del config.train.on_nonfinite, config.mesh
    loaded = config_from_meta({"config": config.to_json_best_effort()})
    log = capsys.readouterr().err
    assert "train.on_nonfinite=stop" in log and "mesh=" in log and log.count("\n") == 1
    assert loaded.to_dict().keys() == expected.keys() and loaded.train.to_dict() == expected["train"]
    assert loaded.denoiser.action_dims.to_dict() == {"0": 2} and set(loaded.data.groups) == {"play", "demo"}


def test_the_config_is_restored_equal_and_locked():
    config = pusht.get_config("debug")
    loaded = config_from_meta({"config": config.to_json_best_effort()})
    assert loaded.to_json_best_effort() == config.to_json_best_effort()
    assert loaded.train.steps == config.train.steps
    with pytest.raises(AttributeError, match="steps"):
        loaded.train.stesp = 3
