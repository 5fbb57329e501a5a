"""Every recipe builds, sets what base sets and nothing else, and its docstring's commands are commands."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import base, policy
from launch.cli import check_overrides
from rlawm_jax.flow import Sampler
from rlawm_jax.models.policy import Policy
from rlawm_jax.training.optimizer import make_schedule
from rlawm_jax.training.step import make_objectives, make_transforms
from rlawm_jax.world_model import PARTS, WorldModel

ROOT = Path(__file__).parents[1]
# fields whose own names are data: datasets, robots
OPEN = ("data.groups", "denoiser.action_dims")


def recipes() -> list[tuple[str, str]]:
    """(module, variant) of every config file."""
    recipes = []
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        recipes += [(path.stem, variant) for variant in getattr(module, "VARIANTS", ("",))]
    return recipes


def recipes_of(*, section: str) -> list[tuple[str, str]]:
    """The recipes of one kind, known by a section that no other kind has."""
    return [(name, variant) for name, variant in recipes() if section in get_config(name, variant)]


def get_config(name: str, variant: str) -> ConfigDict:
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(variant) if inspect.signature(module.get_config).parameters else module.get_config()


def field_names(config: ConfigDict, prefix: str = "") -> set[str]:
    names = set()
    for key, value in config.items():
        path = f"{prefix}{key}"
        names |= field_names(value, f"{path}.") if isinstance(value, ConfigDict) and path not in OPEN else {path}
    return names


@pytest.mark.parametrize(("name", "variant"), recipes_of(section="rla"))
def test_a_recipe_sets_the_fields_of_base_and_its_model_and_optimizers_build(name, variant):
    config = get_config(name, variant)
    assert field_names(config) == field_names(base.get_config())
    assert config.data.seed == config.seed
    config.seed = 7
    assert config.data.seed == 7  # one seed for everything
    model = nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
    assert all(getattr(model, part) is not None for part in PARTS)
    objectives = make_objectives(config)
    assert make_transforms(config, objectives).keys() == objectives.keys()
    Sampler(**config.sampler)
    assert config.data.max_horizon >= config.eval.chunk


@pytest.mark.parametrize(("name", "variant"), recipes_of(section="observed"))
def test_a_policy_recipe_sets_the_fields_of_policy_and_its_networks_and_schedule_build(name, variant):
    config = get_config(name, variant)
    assert field_names(config) == field_names(policy.get_config())
    config.seed = 7
    assert config.data.seed == 7
    nnx.eval_shape(lambda: Policy(config, rngs=nnx.Rngs(0)))
    make_schedule(config.optimizer, 0, config.train.steps)


def commands(name: str) -> list[list[str]]:
    """The `python -m` lines of a config's docstring."""
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    return [shlex.split(line) for line in re.findall(r"^\s*python -m (.+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", sorted({name for name, _ in recipes()} - {"base", "policy", "rl"}))
def test_the_commands_in_a_docstring_exist(name):
    shown = commands(name)
    assert any(command[0] in ("launch.train", "launch.train_policy", "launch.train_rl") for command in shown)
    for module, *arguments in shown:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
        if "define_config()" in source:
            defined.add("config")
        for argument in arguments:
            if argument.startswith("--"):
                flag = argument[2:].split("=")[0]
                assert flag.split(".")[0] in defined, argument
                if flag == "config":
                    path, _, variant = argument.split("=")[1].partition(":")
                    assert (Path(path).stem, variant) in recipes() and (ROOT / path).is_file()
        check_overrides(arguments)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"configs/pusht\.py: expected a variant among demo, debug, found 'small'"):
        get_config("pusht", "small")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float16", r"config\.dtype: expected one of float32, bfloat16, found 'float16'"),
        ("remat", "some", r"config\.remat: expected one of none, full, dots, found 'some'"),
        ("attention", "fast", r"config\.attention: expected one of auto, xla, cudnn, flash, found 'fast'"),
        ("backbone.name", "dinov9", r"dinov9"),
        ("latent_scale.value", 0.0, r"config\.latent_scale\.value: expected a positive number, found 0"),
        ("rla.input_mode", "mul", r"config\.rla\.input_mode: expected one of sub, concat, append, found 'mul'"),
        ("rla.decoder_output", "both", r"config\.rla\.decoder_output: expected one of absolute, residual"),
    ],
)
def test_a_model_that_does_not_exist_is_refused_by_the_name_of_its_field(field, value, message):
    config = get_config("pusht", "debug")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message) as error:
        nnx.eval_shape(lambda: WorldModel(config, backbone=None, rngs=nnx.Rngs(0)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"solver": "rk4", "steps": 3}, r"config\.sampler\.solver: expected one of euler, midpoint, heun, found 'rk4'"),
        ({"solver": "euler", "steps": 0}, r"config\.sampler\.steps: expected at least 1, found 0"),
    ],
)
def test_a_sampler_that_does_not_exist_is_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**sampler)


def test_official_sizes_need_no_devices_to_build():
    model = nnx.eval_shape(lambda: WorldModel(base.get_config(), backbone=None, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
