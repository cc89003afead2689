"""The laws of the tree: no circle of imports, arrows only downwards, and each test on its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.graphs import circle_of

import adamal_kernels

PACKAGE = Path(adamal_kernels.__file__).parent

FLOORS: dict[str, set[str]] = {
    "version": set(),
    "build_config": set(),
    "command_line": set(),
    "user_warning": set(),
    "projections": set(),
    "build_info": {"version", "build_config"},
    "build": {"build_config", "build_info"},
    "core": {"projections"},
    "backends": {"core", "projections", "build_info", "user_warning"},
    "step": {"backends", "core", "projections", "build_info"},
    "modes": {"step", "core", "projections", "user_warning"},
    "checkpoints": {"step", "core", "projections", "user_warning"},
    "watch": {"step", "core", "projections"},
    "optimizer": {"modes", "checkpoints", "watch", "step", "backends", "projections"},
    "verify": {"optimizer", "backends", "core", "projections", "command_line"},
    "info": {"verify", "backends", "build_info", "command_line", "version"},
    "bench": {"info", "verify", "optimizer", "backends", "core", "command_line"},
    "__main__": {"version"},
    "__init__": {"optimizer", "watch", "modes", "backends", "projections", "version"},
}
"""The package's folders and the modules beside them, from below: what each may import."""


def imported(statement: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """Yield the absolute name of each module that a statement imports from, and what from it."""
    if isinstance(statement, ast.Import):
        yield from ((alias.name, "") for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        source = statement.module or ""
        if statement.level:
            up = statement.level - is_package
            parents = module.split(".")[: -up if up else None]
            source = ".".join([*parents, source] if source else parents)
        yield from ((source, alias.name) for alias in statement.names)


def python_imports(package: Path) -> dict[str, set[str]]:
    """Return which modules of a package each of its modules imports, in whatever place.

    Imports that only type checkers see and those inside of functions count. That a folder's
    ``__init__`` runs before its modules do does not.
    """
    files = {}
    for file in package.rglob("*.py"):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for statement in ast.walk(ast.parse(file.read_text("utf-8"))):
            for source, name in imported(statement, module, file.name == "__init__.py"):
                target = f"{source}.{name}"
                graph[module] |= {target if target in files else source} & files.keys()
    return graph


def forbidden_imports(
    graph: Mapping[str, set[str]], floors: Mapping[str, set[str]]
) -> dict[str, set[str]]:
    """Return the modules that import what their floor may not, or are on none, and what that is."""
    found = {}
    for module, targets in graph.items():
        floor = floor_of(module)
        allowed = {floor, *floors.get(floor, ())}
        forbidden = {target for target in targets if floor_of(target) not in allowed}
        if forbidden or floor not in floors:
            found[module] = forbidden
    return found


def floor_of(module: str) -> str:
    """Return the folder of the package, or the module beside them, that a module belongs to."""
    return (*module.split("."), "__init__")[1]


def borrowed_tests(tests: Path) -> set[tuple[str, str]]:
    """Return the test modules that import another, and which."""
    files = {file.stem: file for file in tests.rglob("test_*.py")}
    return {
        (importer, name)
        for importer, file in files.items()
        for statement in ast.walk(ast.parse(file.read_text("utf-8")))
        for source, taken in imported(statement, importer, is_package=False)
        for name in (*source.split("."), taken)
        if name in files
    }


def test_no_python_module_imports_what_imports_it() -> None:
    assert circle_of(python_imports(PACKAGE)) == []


def test_python_imports_go_downwards() -> None:
    assert forbidden_imports(python_imports(PACKAGE), FLOORS) == {}


def test_the_python_floors_are_in_order() -> None:
    below: set[str] = set()
    for floor, allowed in FLOORS.items():
        assert allowed <= below, floor
        below.add(floor)


def test_no_test_module_is_imported_by_another(pytestconfig: pytest.Config) -> None:
    assert borrowed_tests(pytestconfig.rootpath / "tests") == set()


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    """Write a package of these files, each folder with an ``__init__``."""
    package = folder / "house"
    for name, content in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    for directory in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (directory / "__init__.py").touch()
    return package


ONE_WAY = {"core/a.py": "", "step/b.py": "from ..core.a import name\n"}

CIRCLES = {
    "plain": {"core/a.py": "from .b import name\n", "core/b.py": "from .a import name\n"},
    "by the module's name": {"core/a.py": "from . import b\n", "core/b.py": "from . import a\n"},
    "absolute": {"core/a.py": "import house.core.b\n", "core/b.py": "from house.core import a\n"},
    "for type checkers": {
        "core/a.py": "if TYPE_CHECKING:\n    from .b import Name\n",
        "core/b.py": "from .a import name\n",
    },
    "inside of a function": {
        "core/a.py": "def late():\n    from .b import name\n",
        "core/b.py": "from .a import name\n",
    },
    "of three folders": {
        "core/a.py": "from ..modes.c import name\n",
        "step/b.py": "from ..core.a import name\n",
        "modes/c.py": "from ..step import b\n",
    },
    "through a folder": {
        "core/__init__.py": "from .a import name\n",
        "core/a.py": "from ..step.b import name\n",
        "step/b.py": "from ..core import name\n",
    },
    "with itself": {"core/a.py": "from .a import name\n"},
}


@pytest.mark.parametrize("name", CIRCLES)
def test_a_circle_of_python_imports_is_found(name: str, tmp_path: Path) -> None:
    assert circle_of(python_imports(tree(tmp_path / "good", ONE_WAY))) == []
    found = circle_of(python_imports(tree(tmp_path / "bad", CIRCLES[name])))
    assert {module.rpartition(".")[2] for module in found} >= {"a"}


UPWARDS = {
    "plain": "from ..step.b import name\n",
    "absolute": "from house.step.b import name\n",
    "the folder": "from .. import step\n",
    "for type checkers": "if TYPE_CHECKING:\n    from ..step import b\n",
    "inside of a function": "def late():\n    import house.step.b\n",
}


@pytest.mark.parametrize("name", UPWARDS)
def test_a_python_import_that_goes_upwards_is_found(name: str, tmp_path: Path) -> None:
    floors = {"core": set(), "step": {"core"}, "__init__": set()}
    good = python_imports(tree(tmp_path / "good", ONE_WAY))
    assert forbidden_imports(good, floors) == {}
    bad = python_imports(tree(tmp_path / "bad", {"core/a.py": UPWARDS[name], "step/b.py": ""}))
    assert forbidden_imports(bad, floors).keys() == {"house.core.a"}


def test_a_python_folder_that_is_no_floor_is_found(tmp_path: Path) -> None:
    graph = python_imports(tree(tmp_path, {"attic/a.py": "", "cellar.py": ""}))
    found = forbidden_imports(graph, {"__init__": set()})
    assert found.keys() == {"house.attic", "house.attic.a", "house.cellar"}


BORROWED = (
    "import test_b\n",
    "from test_b import name\n",
    "from tests.core import test_b\n",
    "def late():\n    from core.test_b import name\n",
)


@pytest.mark.parametrize("content", BORROWED)
def test_a_borrowed_test_is_found(content: str, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "test_b.py").write_text("import helpers\n")
    (tmp_path / "test_a.py").write_text("from helpers import name\n")
    assert borrowed_tests(tmp_path) == set()
    (tmp_path / "test_a.py").write_text(content)
    assert borrowed_tests(tmp_path) == {("test_a", "test_b")}
