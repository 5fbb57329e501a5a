"""What the Markdown pages point to and promise: links, paths, commands and figures, each problem as one line.

A word in capitals is a placeholder (DIR, RUN, configs/X.py) and stands for anything of its kind.
"""

import contextlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

from absl import flags
from ml_collections import config_flags

from launch.cli import check_overrides

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "data", "launch", "rlawm_jax", "tests")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_]*\b")
INTERVAL = re.compile(r"[-+]?\d[\d.]* \[[-+]?\d[\d.]*, [-+]?\d[\d.]*\]")
# whose scripts hand what they do not know to launch.train
TRAINS = ("launch/slurm/train.sbatch", "launch/tpu/pod.sh")
# of which every field of a recipe is one
FIELDS = ("configs/base.py", "configs/policy.py", "configs/rl.py")


def pages() -> list[Path]:
    """Every page of the repository."""
    named = ("README.md", "METHOD.md")
    beside = (page for folder in FOLDERS for name in named for page in (ROOT / folder).rglob(name))
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(beside)]


def split_fences(text: str) -> tuple[str, list[str]]:
    """The text outside of fenced blocks, and the blocks."""
    pieces = re.split(r"^```.*\n", text, flags=re.MULTILINE)
    return "".join(pieces[::2]), pieces[1::2]


def code_spans(text: str) -> list[str]:
    """What stands between backticks, on one line; a span may be broken over two."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split_fences(text)[0])]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", split_fences(text)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> Iterator[str]:
    """Relative links of a page in `folder` that lead nowhere, and anchors that no heading has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", split_fences(text)[0]):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path
        if path and not target.exists():
            yield f"link {link}: no such file"
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            yield f"link {link}: no such heading"


def missing_paths(text: str) -> Iterator[str]:
    """Paths into the repository, in backticks or fenced blocks, at which nothing is."""
    code = "\n".join([*code_spans(text), *split_fences(text)[1]])
    for path in re.findall(rf"(?<![\w/.{{}}-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", code):
        if not any(ROOT.glob(PLACEHOLDER.sub("*", path.rstrip("./")))):
            yield f"path {path}: nothing is there"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page as words: lines of fenced blocks, and code spans that begin like one."""
    for block in split_fences(text)[1]:
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\b(python|bash|sbatch|pytest) ", line):
                yield _before_and(shlex.split(line, comments=True))
    for span in code_spans(text):
        if re.match(r"(python -m|bash|sbatch|pytest) |--[a-z]", span):
            yield shlex.split(span)
        elif re.match(r"launch\.\w+ --", span):
            yield ["python", "-m", *shlex.split(span)]


def _before_and(words: list[str]) -> list[str]:
    return list(itertools.takewhile(lambda word: word != "&&", words))


def command_problems(words: list[str]) -> Iterator[str]:
    """What a command names that does not exist: its module or script, options, recipe, variant, fields."""
    match words:
        case ["python", "-m", module, *rest]:
            yield from _module_problems(module, rest)
        case ["bash" | "sbatch", *rest]:
            at = next((i for i, word in enumerate(rest) if not word.startswith("-")), None)
            if at is not None:
                yield from _script_problems(rest[at], rest[at + 1 :])
        case ["pytest", *rest]:
            paths = [word for word in rest if word.startswith("tests/")]
            yield from (f"pytest {path}: no such test" for path in paths if not (ROOT / path).exists())
            yield from _keyword_problems(rest, paths)
        case [option, *_] if option.startswith("--"):
            yield from _loose_problems(words)


def _keyword_problems(rest: list[str], paths: list[str]) -> Iterator[str]:
    """A `-k WORD` that selects nothing."""
    if "-k" in rest:
        word = rest[rest.index("-k") + 1]
        named = itertools.chain.from_iterable(_tests(ROOT / path) for path in paths or ["tests"])
        if not any(word in f"{file.relative_to(ROOT)} {file.read_text()}" for file in named):
            yield f"pytest -k {word}: selects nothing"


def _tests(path: Path) -> Iterable[Path]:
    return path.rglob("test_*.py") if path.is_dir() else [path]


def _module_problems(module: str, rest: list[str]) -> Iterator[str]:
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not module.startswith(tuple(f"{folder}." for folder in FOLDERS)):
        return
    if not file.is_file():
        yield f"python -m {module}: no such module"
        return
    options = [word for word in rest if word.startswith("--")]
    known = module_options(file)
    for name in map(_name, options):
        if name.split(".")[0] not in known and not (name.startswith("no") and name[2:] in known):
            yield f"python -m {module}: unknown option --{name}"
    builders = rest[0].split("|") if module == "data.build" and rest and rest[0] not in options else []
    for name in builders:
        if not any(ROOT.glob(f"data/{PLACEHOLDER.sub('*', name)}/builder.py")):
            yield f"python -m data.build {name}: no such builder"
    yield from _recipe_problems(options)


def _script_problems(script: str, rest: list[str]) -> Iterator[str]:
    if PLACEHOLDER.search(Path(script).name):
        return
    if not (ROOT / script).is_file():
        yield f"bash {script}: no such script"
        return
    at = rest.index("--") if "--" in rest else len(rest)
    own, passed_on = rest[:at], rest[at + 1 :]
    options = [word for word in own if word.startswith("--")]
    if script.endswith(".sbatch"):
        options, passed_on = [], own
    known = script_options((ROOT / script).read_text())
    yield from (f"bash {script}: unknown option --{n}" for n in map(_name, options) if n not in known)
    if script in TRAINS:
        yield from _module_problems("launch.train", passed_on)
    elif passed_on:
        yield from command_problems(["pytest", *passed_on])


def _loose_problems(words: list[str]) -> Iterator[str]:
    """Options without their command: each is one of some command, overrides fit some recipe."""
    overrides = [word for word in words if word.startswith("--config.")]
    if overrides:
        problems = [list(_recipe_problems([f"--config={recipe}", *overrides])) for recipe in FIELDS]
        yield from min(problems, key=len)
    scripts = [path for kind in ("*.sh", "*.sbatch") for path in (ROOT / "launch").rglob(kind)]
    known = set().union(
        *(module_options(path) for path in modules()), *(_spelled(path.read_text()) for path in scripts)
    )
    for name in map(_name, (word for word in words if word.startswith("--"))):
        if name.split(".")[0] not in known and not (name.startswith("no") and name[2:] in known):
            yield f"--{name}: an option of no command"


def _recipe_problems(options: list[str]) -> Iterator[str]:
    """A recipe or variant that does not exist, an override of no field, or a value that the field does not take."""
    recipes = [word.partition("=")[2] for word in options if _name(word) == "config"]
    overrides = [word for word in options if word.startswith("--config.") and not PLACEHOLDER.search(_name(word))]
    for recipe in itertools.chain.from_iterable(map(expand, recipes)):
        if not recipe.startswith("configs/") or PLACEHOLDER.search(recipe):
            continue  # a recipe of a run folder, or any
        argv = [f"--config={recipe}", *overrides]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                check_overrides(argv)
                _parse([word for word in argv if "=" in word and not PLACEHOLDER.search(word.partition("=")[2])])
            except SystemExit:
                yield said.getvalue().strip()
            except (flags.Error, ValueError) as error:
                yield f"{' '.join(argv)}: {str(error).splitlines()[0]}"


def _parse(words: list[str]) -> None:
    """Hand the words to ml_collections as the launcher does."""
    argv, values = ["program", *words], flags.FlagValues()
    with patch.object(sys, "argv", argv):  # where it looks for overrides
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
        values(argv)


def expand(text: str) -> list[str]:
    """a{b,c} is ab and ac."""
    before, brace, rest = text.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{choice}{after}" for choice in inside.split(",")] if brace else [text]


def recipe_spans(text: str) -> Iterator[str]:
    """Variants that a page names (`configs/pusht.py:demo`, several in braces) and that do not exist."""
    for span in code_spans(text):
        if re.match(r"configs/\w+\.py:\S+$", span):
            yield from _recipe_problems([f"--config={span}"])


def unknown_fields(text: str) -> Iterator[str]:
    """Fields that a page names (`config.a.b`) and no recipe has."""
    for span in code_spans(text):
        if re.fullmatch(r"config(\.[a-z_]+)+", span) and span not in ("config.py", "config.yaml"):
            problems = [list(_recipe_problems([f"--config={recipe}", f"--{span}=VALUE"])) for recipe in FIELDS]
            yield from min(problems, key=len)


def repeated_rows(texts: dict[str, str]) -> Iterator[str]:
    """Table rows whose intervals stand in another row, of any page; the README repeats one beside a link."""
    rows = []
    for name, text in texts.items():
        for line in text.splitlines():
            figures = set(INTERVAL.findall(line))
            if line.startswith("|") and figures and not (name == "README.md" and "](" in line):
                rows.append((name, line, figures))
    for (page, row, figures), (other, again, others) in itertools.combinations(rows, 2):
        if len(figures & others) >= min(2, len(figures), len(others)):
            yield f"{page} and {other} have the same figures: {row[:60]} / {again[:60]}"


def modules() -> list[Path]:
    """Files that are run as `python -m`."""
    return [*(ROOT / "launch").glob("*.py"), ROOT / "data" / "build.py", *(ROOT / "tests" / "tools").glob("*.py")]


@cache
def module_options(path: Path) -> set[str]:
    """Options of an absl or argparse program, those of launch.cli included where it uses that."""
    source = path.read_text()
    options = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | set(
        re.findall(r'add_argument\(\s*"--(\w+)"', source)
    )
    if "from launch import cli" in source:
        options |= module_options(ROOT / "launch" / "cli.py") - {"config"}
    if "cli.define_config()" in source or "parse_known_args()" in source:
        options.add("config")
    return options | {"help"}


def script_options(source: str) -> set[str]:
    """Options of a shell script: the patterns of its `case`."""
    patterns = re.findall(r"^\s*((?:--?[\w-]+(?:=\*)?(?: \| )?)+)\)", source, re.MULTILINE)
    return {name for pattern in patterns for name in re.findall(r"--([\w-]+)", pattern)}


def _spelled(source: str) -> set[str]:
    return set(re.findall(r"--([a-z][\w-]*)", source))


def _name(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]
