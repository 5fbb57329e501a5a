"""Who may import whom (tests/architecture.py): the rules hold here, and each of them can be broken."""

import pytest

from tests.architecture import (
    ROOT,
    RULES,
    Tree,
    circles,
    declared_order,
    imported_names,
    imports_of_libraries,
    imports_of_packages,
    imports_upwards,
    unmirrored_tests,
)

PAGE = """
| room of `rlawm_jax/` | holds |
|---|---|
| `rng.py`, `flow.py` | `streams/`; flows |
| `models/` | networks |
| `rl/` | learning |

| other | table |
|---|---|
| `data/` | datasets |
"""
SOUND = {
    "rlawm_jax/__init__.py": "",
    "rlawm_jax/rng.py": "import jax",
    "rlawm_jax/flow.py": "from rlawm_jax import rng",
    "rlawm_jax/models/__init__.py": "",
    "rlawm_jax/models/vit.py": "from rlawm_jax.flow import Sampler",
    "rlawm_jax/rl/env.py": "import rlawm_jax.models.vit\nfrom data.episodes import Store",
    "data/episodes.py": "import pygame",
    "configs/base.py": "from data import episodes",
    "launch/train.py": "def main():\n    from configs import base\n    from rlawm_jax.rl import env",
    "tests/rl/test_env.py": "import torch",
}


@pytest.fixture(scope="module")
def here() -> Tree:
    return Tree(ROOT)


@pytest.fixture
def tree(tmp_path):
    """tree(files) -> the sound tree with these files added or replaced."""

    def make(files: dict[str, str]) -> Tree:
        for name, code in (SOUND | {"CONTRIBUTING.md": PAGE} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        return Tree(tmp_path)

    return make


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_repository_keeps(rule, here):
    assert list(rule(here)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_breaks_no_rule(rule, tree):
    assert list(rule(tree({}))) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"rlawm_jax/rng.py": "def f():\n    from rlawm_jax.flow import x"},
            ["circle of files: ", "circle of rooms: "],
        ),
        (
            {"data/video.py": "from data import clips", "data/clips.py": "if TYPE_CHECKING:\n    import data.video"},
            ["circle of files: "],
        ),
        # no file imports itself this way, and yet neither room works without the other
        (
            {"rlawm_jax/models/policy.py": "from rlawm_jax.rl import ppo", "rlawm_jax/rl/ppo.py": ""},
            ["circle of rooms: "],
        ),
    ],
)
def test_a_circle_is_found(tree, files, expected):
    lines = list(circles(tree(files)))
    assert len(lines) == len(expected) and all(map(str.startswith, lines, expected))


def test_an_import_upwards_is_found_anywhere_in_a_file(tree):
    upwards = "class A:\n    def f(self):\n        from rlawm_jax.rl import env"
    assert list(imports_upwards(tree({"rlawm_jax/models/policy.py": upwards}))) == [
        "rlawm_jax/models/policy.py: imports rlawm_jax.rl.env, which stands further down in CONTRIBUTING.md"
    ]


def test_the_table_lists_the_rooms_that_exist(tree):
    rows = PAGE.replace("| `rl/` | learning |\n", "| `planning/` | |\n")
    problems = list(imports_upwards(tree({"CONTRIBUTING.md": rows})))
    assert problems == [
        "CONTRIBUTING.md: room planning: there is none",
        "CONTRIBUTING.md: room rl: not in the table",
    ]
    with pytest.raises(ValueError, match=r"expected a table that begins with \| room of `rlawm_jax/` \|, found none"):
        declared_order(tree({"CONTRIBUTING.md": "no table"}).root)


@pytest.mark.parametrize(
    ("place", "code", "other"),
    [
        ("rlawm_jax/models/policy.py", "def f():\n    from configs import base", "configs.base"),
        ("rlawm_jax/models/policy.py", "from launch.train import main", "launch.train"),
        ("data/video.py", "from rlawm_jax import rng", "rlawm_jax.rng"),
        ("data/video.py", "import configs.base", "configs.base"),
        ("configs/rl.py", "from rlawm_jax.rl.env import SIZE", "rlawm_jax.rl.env"),
    ],
)
def test_an_import_of_a_package_that_must_stay_unknown_is_found(tree, place, code, other):
    own = place.partition("/")[0]
    assert list(imports_of_packages(tree({place: code}))) == [
        f"{place}: imports {other}, and {own} imports nothing of that package"
    ]


@pytest.mark.parametrize(
    ("place", "code", "library"),
    [
        ("rlawm_jax/models/policy.py", "def f():\n    import torch._utils as rebuild", "torch"),
        ("rlawm_jax/models/policy.py", "importlib.import_module('torch.nn')", "torch"),
        ("rlawm_jax/converted/policy.py", "from torch import nn", "torch"),
        ("launch/train.py", "import orbax.checkpoint as ocp", "orbax"),
        ("rlawm_jax/rl/ppo.py", "from gym_pusht.envs.pusht import PushTEnv", "gym_pusht"),
        ("launch/train.py", "import pymunk", "pymunk"),
    ],
)
def test_a_library_away_from_its_home_is_found(tree, place, code, library):
    lines = list(imports_of_libraries(tree({place: code})))
    assert len(lines) == 1 and lines[0].startswith(f"{place}: imports {library}, whose home is ")


def test_libraries_may_be_imported_at_home(tree):
    homes = {"rlawm_jax/convert/a.py": "torch", "rlawm_jax/sim/a.py": "pymunk", "data/b.py": "pymunk"}
    homes = {place: f"import {library}" for place, library in homes.items()}
    assert list(imports_of_libraries(tree(homes))) == []


def test_a_test_that_mirrors_nothing_is_found(tree):
    files = {"tests/rl/test_planning.py": "", "tests/test_models.py": "", "tests/data/test_episodes.py": ""}
    assert list(unmirrored_tests(tree(files))) == [
        "tests/rl/test_planning.py: expected a file rlawm_jax/rl/planning.py, found none"
    ]


def test_imports_are_read_as_python_means_them():
    def names(code: str, module: str = "a.b.c", **kwargs) -> list[str]:
        return list(imported_names(code, module, **kwargs))

    assert names("import x, y.z as w") == ["x", "y.z"]
    assert names("from x.y import z, w as v") == ["x.y.z", "x.y.w"]
    assert names("from . import x\nfrom .d import e\nfrom ..f import g") == ["a.b.x", "a.b.d.e", "a.f.g"]
    assert names("from . import x", "a.b", is_package=True) == ["a.b.x"]
    assert names("import_module('x')\n__import__('y')\nimportlib.import_module(name)") == ["x", "y"]
