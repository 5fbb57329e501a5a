"""The pages keep their promises: links and paths lead somewhere, commands parse, a figure stands once."""

import shlex

import pytest

from tests import pages
from tests.pages import ROOT

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in pages.pages()}
README_LINES = 140


def fenced(command: str) -> str:
    return f"```\n{command}\n```\n"


def command_problems(text: str) -> list[str]:
    return [problem for words in pages.commands(text) for problem in pages.command_problems(words)]


def test_there_are_pages_with_commands_of_every_kind():
    assert {"README.md", "configs/README.md", "data/README.md", "launch/README.md", "launch/tpu/README.md"} <= set(
        PAGES
    )
    heads = {
        " ".join(words[: 3 if words[0] == "python" else 1]) for text in PAGES.values() for words in pages.commands(text)
    }
    assert {"python -m launch.train", "python -m data.build", "bash", "sbatch", "pytest"} <= heads


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert not list(pages.broken_links(PAGES[name], (ROOT / name).parent))


@pytest.mark.parametrize("name", PAGES)
def test_every_path_into_the_repository_exists(name):
    assert not list(pages.missing_paths(PAGES[name]))


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses(name):
    assert not command_problems(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_every_recipe_and_field_that_is_named_exists(name):
    assert not [*pages.recipe_spans(PAGES[name]), *pages.unknown_fields(PAGES[name])]


def test_no_figure_is_repeated():
    assert not list(pages.repeated_rows(PAGES))


def test_the_readme_is_a_landing_page():
    assert len(PAGES["README.md"].splitlines()) <= README_LINES


def test_every_entry_point_is_on_the_page_of_commands():
    page = PAGES["launch/README.md"]
    modules = {path.stem for path in (ROOT / "launch").glob("[a-z]*.py")} - {"cli"}
    scripts = {path.name for path in (ROOT / "launch").glob("*.sh")} - {"venv.sh"}
    assert all(f"`python -m launch.{module} " in page for module in modules)
    assert all(f"`bash launch/{script}`" in page for script in scripts)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](data/nowhere.md)", "link data/nowhere.md: no such file"),
        ("[a](CONTRIBUTING.md#no-such)", "link CONTRIBUTING.md#no-such: no such heading"),
        ("# Here\n[a](#there)", "link #there: no such heading"),
    ],
)
def test_a_broken_link_is_found(text, problem):
    assert list(pages.broken_links(text, ROOT)) == [problem]


def test_valid_links_are_accepted():
    text = "# Where: it is, now\n[a](#where-it-is-now) [b](https://x.org/y) [c](launch) [d](CONTRIBUTING.md#glossary)"
    assert not list(pages.broken_links(text, ROOT))


@pytest.mark.parametrize("text", ["`data/nowhere.py`", fenced("cat configs/none.py"), "`rlawm_jax/eyes/`"])
def test_a_path_that_does_not_exist_is_found(text):
    assert len(list(pages.missing_paths(text))) == 1


def test_placeholders_and_paths_of_other_trees_are_accepted():
    text = (
        "`configs/X.py`, `data/NAME/builder.py`, `RELEASE/data/elsewhere`, `launch/requirements-*.txt`, data/prose.py"
    )
    assert not list(pages.missing_paths(text))


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python -m launch.dream --workdir=DIR", "python -m launch.dream: no such module"),
        ("python -m launch.train --work=DIR", "python -m launch.train: unknown option --work"),
        ("python -m launch.evaluate --config=configs/pusht.py", "python -m launch.evaluate: unknown option --config"),
        ("python -m data.build films --data_dir=DIR", "python -m data.build films: no such builder"),
        ("python -m launch.train --config=configs/none.py", "found no file configs/none.py"),
        ("python -m launch.train --config=configs/pusht.py:huge", "expected a variant among demo, debug, found 'huge'"),
        ("python -m launch.train --config=configs/pusht.py --config.rla.witdh=8", "did you mean --config.rla.width?"),
        ("python -m launch.train --config=configs/pusht.py --config.rla.width=eight", "--config.rla.width=eight"),
        (
            "python -m launch.train --config=configs/pusht.py --config.denoiser.action_dims.0=7",
            "--config.denoiser.action_dims.0=7",
        ),
        ("python -m tests.tools.soak --fault=3", "python -m tests.tools.soak: unknown option --fault"),
        ("bash launch/dream.sh", "bash launch/dream.sh: no such script"),
        ("bash launch/demo.sh --fast", "bash launch/demo.sh: unknown option --fast"),
        ("bash launch/test.sh -- -k no_such_thing_at_all", "pytest -k no_such_thing_at_all: selects nothing"),
        ("bash launch/tpu/pod.sh train --name=N -- --wordir=DIR", "python -m launch.train: unknown option --wordir"),
        ("sbatch --nodes=4 launch/slurm/train.sbatch --wordir=x", "python -m launch.train: unknown option --wordir"),
        ("pytest tests/test_nothing.py", "pytest tests/test_nothing.py: no such test"),
        ("pytest tests/test_world_model.py -k no_such_test", "pytest -k no_such_test: selects nothing"),
    ],
)
@pytest.mark.parametrize("page", [fenced, "`{}`".format], ids=["block", "span"])
def test_a_command_that_would_be_refused_is_found(page, command, problem):
    if "no_such" in command:
        # assembled, or this file would be what it selects
        command, problem = command.replace("_such", "_such" * 2), problem.replace("_such", "_such" * 2)
    problems = command_problems(page(command))
    assert problems and problem in problems[0]


@pytest.mark.parametrize("span", ["--config.rla.witdh=8", "--config.rla.num_tokens=many", "--sideways"])
def test_an_option_that_no_command_has_is_found(span):
    assert command_problems(f"`{span}`")


def test_a_variant_or_field_that_no_recipe_has_is_found():
    assert list(pages.recipe_spans("`configs/pusht.py:{demo,huge}`"))
    assert list(pages.unknown_fields("`config.rla.witdh`"))


def test_valid_commands_are_accepted():
    good = [
        "python -m launch.train --config=configs/pusht.py:demo --workdir=DIR --config.rla.num_tokens=8 --debug",
        "python -m launch.train --config=configs/X.py --workdir=DIR \\\n  --config.mesh.fsdp=-1",
        "python -m launch.train_policy --config=configs/pusht_policy.py --config.data.n_labelled=N",
        "python -m launch.convert --kind=release --noparity",
        "bash launch/test.sh --with torch -- -k backbone   # a comment",
    ]
    assert not command_problems("".join(map(fenced, good)))
    assert len([words for text in good for words in pages.commands(fenced(text))]) == len(good)
    assert shlex.split(good[0]) in list(pages.commands(fenced(good[0])))


@pytest.mark.parametrize(
    "again",
    [
        "| model, alias | 1.2 [1.0, 1.4] | 0.3 [0.2, 0.4] |",
        "| other columns | 0.3 [0.2, 0.4] | 7 | 1.2 [1.0, 1.4] | 9.9 [9.8, 9.9] |",
        "| one of them | 1.2 [1.0, 1.4] |",
    ],
)
def test_a_repeated_row_is_found(again):
    row = "| model | 1.2 [1.0, 1.4] | 0.3 [0.2, 0.4] |"
    assert list(pages.repeated_rows({"a.md": row, "b.md": again}))
    assert list(pages.repeated_rows({"a.md": f"{row}\n{again}"}))
    assert list(pages.repeated_rows({"a.md": row, "README.md": again}))


def test_different_rows_and_linked_ones_of_the_readme_are_accepted():
    row = "| model | 1.2 [1.0, 1.4] | 0.3 [0.2, 0.4] |"
    assert not list(pages.repeated_rows({"a.md": row, "b.md": "| other | 1.2 [1.0, 1.4] | 0.5 [0.2, 0.4] |"}))
    assert not list(pages.repeated_rows({"a.md": row, "README.md": "| model | 1.2 [1.0, 1.4] | [a](a.md) |"}))
