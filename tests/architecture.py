"""Who imports whom: python -m tests.architecture prints every room with what it imports, and what breaks the rules.

A room is a folder or a top-level file of rlawm_jax/; their order is the table of CONTRIBUTING.md. All imports count, in
functions too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "rlawm_jax"
# our packages, and which others each may import
PACKAGES = {"data": (), PACKAGE: ("data",), "configs": ("data",), "launch": ("data", PACKAGE, "configs")}
# libraries, and the only folders that import them
SIMULATORS = ("gym_pusht", "gymnasium", "mani_skill", "pybullet", "pygame", "pymunk")
HOMES = {
    "torch": ("rlawm_jax/convert",),
    "orbax": ("rlawm_jax/run_folder",),
    **dict.fromkeys(SIMULATORS, ("rlawm_jax/sim", "data")),
}
# test files that mirror no file, and what they are about
OF_NO_FILE = {
    "tests/convert/test_official_width.py": "conversion, once more at the sizes of the release",
    "tests/data/test_beam.py": "data/recordings.py under Apache Beam, which is optional",
    "tests/data/test_native.py": "data/maniskill_native",
    "tests/interactive/test_page.py": "rlawm_jax/reports/templates/imagine.html in a browser",
    "tests/launch/test_cluster_files.py": "launch/gke, launch/slurm and launch/tpu",
    "tests/launch/test_release_commands.py": "three commands one after the other",
    "tests/launch/test_venv.py": "launch/venv.sh",
    "tests/rl/test_rl_hosts.py": "the RL loop on several processes",
    "tests/sim/test_simulators.py": "every simulator behind the protocol of rlawm_jax/sim",
    "tests/test_architecture.py": "all files",
    "tests/test_method.py": "rlawm_jax/METHOD.md",
    "tests/test_pages.py": "the pages beside the code",
    "tests/test_recipes.py": "configs/maniskill.py and configs/iws.py",
}


class Tree:
    """The Python files of our packages under `root`, and what they import.

    `inner` maps every module to those of ours that it imports, `outer` to the names of all others.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files = {
            _module(path.relative_to(root)): path
            for package in PACKAGES
            for path in sorted((root / package).rglob("*.py"))
        }
        self.inner: dict[str, set[str]] = {}
        self.outer: dict[str, set[str]] = {}
        for module, path in self.files.items():
            names = set(imported_names(path.read_text(), module, is_package=path.name == "__init__.py"))
            ours = {file for name in names if (file := self._of_ours(name))}
            self.inner[module] = ours - {module}
            self.outer[module] = {name for name in names if not self._of_ours(name)}

    def _of_ours(self, name: str) -> str:
        """The module that a dotted name is, or is in; empty for a library's."""
        while name and name not in self.files:
            name = name.rpartition(".")[0]
        return name

    def place(self, module: str) -> str:
        """A module's file, as in a message."""
        return self.files[module].relative_to(self.root).as_posix()

    def rooms(self) -> dict[str, set[str]]:
        """The rooms of the package, each with the others that it imports."""
        rooms: dict[str, set[str]] = {}
        for module, imported in self.inner.items():
            if room := room_of(module):
                rooms.setdefault(room, set()).update(filter(None, map(room_of, imported)))
        return {room: imported - {room} for room, imported in sorted(rooms.items())}


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of a module of the package: `rlawm_jax.rl.env` is in rl; empty for any other."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == PACKAGE else ""


def imported_names(code: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names that a module's code imports, wherever in it; of `from a import b`, a.b.

    Relative ones are spelt out; names given to import_module and __import__ count where they are literal.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = [*above, *filter(None, [node.module])]
            yield from (".".join([*source, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def declared_order(root: Path) -> list[tuple[str, ...]]:
    """The rooms in the table of CONTRIBUTING.md, row by row."""
    page = (root / "CONTRIBUTING.md").read_text()
    table = re.search(rf"^\| room of `{PACKAGE}/` \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    if table is None:
        raise ValueError(f"CONTRIBUTING.md: expected a table that begins with | room of `{PACKAGE}/` |, found none")
    cells = [row.split("|")[1] for row in table[1].splitlines()]
    return [tuple(re.sub(r"(\.py|/)$", "", name) for name in re.findall(r"`([^`]+)`", cell)) for cell in cells]


def circles(tree: Tree) -> Iterator[str]:
    """A circle of files, and one of rooms, where there are any."""
    for kind, graph in (("files", tree.inner), ("rooms", tree.rooms())):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield f"circle of {kind}: {' <- '.join(error.args[1])}"


def imports_upwards(tree: Tree) -> Iterator[str]:
    """Imports of a room further down the table; rooms that stand in it and nowhere else, or the other way round."""
    rank = {room: i for i, row in enumerate(declared_order(tree.root)) for room in row}
    there = set(tree.rooms())
    for room in sorted(there ^ rank.keys()):
        yield f"CONTRIBUTING.md: room {room}: " + ("not in the table" if room in there else "there is none")
    for module, imported in tree.inner.items():
        for other in sorted(imported):
            mine, its = (rank.get(room_of(name), -1) for name in (module, other))
            if -1 < mine < its:
                yield f"{tree.place(module)}: imports {other}, which stands further down in CONTRIBUTING.md"


def imports_of_packages(tree: Tree) -> Iterator[str]:
    """Imports of a package of ours that the importing one must not know."""
    for module, imported in tree.inner.items():
        own = module.partition(".")[0]
        for other in sorted(imported):
            if other.partition(".")[0] not in (own, *PACKAGES[own]):
                yield f"{tree.place(module)}: imports {other}, and {own} imports nothing of that package"


def imports_of_libraries(tree: Tree) -> Iterator[str]:
    """Imports of a library outside its home."""
    for module, imported in tree.outer.items():
        for library in sorted({name.partition(".")[0] for name in imported} & HOMES.keys()):
            homes = HOMES[library]
            if not any(tree.place(module).startswith(f"{home}/") for home in homes):
                yield f"{tree.place(module)}: imports {library}, whose home is {' and '.join(homes)}"


def unmirrored_tests(tree: Tree) -> Iterator[str]:
    """Test files that mirror neither a file nor a folder of ours and do not stand in `OF_NO_FILE`."""
    for path in sorted((tree.root / "tests").rglob("test_*.py")):
        place = path.relative_to(tree.root)
        mirrored = Path(*place.parts[1:-1], path.stem.removeprefix("test_"))
        candidates = [folder / mirrored for folder in (tree.root / PACKAGE, tree.root, tree.root / "tests")]
        there = any(where.is_dir() or where.with_suffix(".py").is_file() for where in candidates)
        if not there and place.as_posix() not in OF_NO_FILE:
            yield f"{place.as_posix()}: expected a file {PACKAGE}/{mirrored.as_posix()}.py, found none"


RULES = (circles, imports_upwards, imports_of_packages, imports_of_libraries, unmirrored_tests)


def main() -> int:
    """Print the rooms and what breaks a rule; exit status 1 where anything does."""
    tree = Tree(ROOT)
    rooms = tree.rooms()
    for room in (room for row in declared_order(ROOT) for room in row):
        print(f"{room:16} {', '.join(sorted(rooms.get(room, ()))) or '-'}")
    problems = [line for rule in RULES for line in rule(tree)]
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
