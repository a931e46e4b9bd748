"""The design, kept: the direction of imports, what is at the top, and the dependencies."""

from __future__ import annotations

import ast
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest

from know_cli.methods.registry import METHODS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "know_cli"
HYPER_MODELS = sorted({method.hyper_model for method in METHODS if method.hyper_model})
# From the top of the data flow down; a module imports only from its own layer and those below.
LAYERS = [
    "cli", "plots", "demo", "benchmark", "evaluation", "meta", "lab", "choosing", "callbacks", "forgetting", "prediction", "methods",
    *HYPER_MODELS, "engine", "ranks", "behaviour", "kinds", "structure", "normalisation", "sources",
    "pairs", "roles", "optimisers", "names", "checkpoints", "passes", "files", "errors",
]  # fmt: skip
# What must not be imported although it is below: importer → imported.
NEVER = [
    ("evaluation", "meta"), ("engine", "ranks.torchrun"), ("forgetting", "prediction"), ("forgetting", "methods"),
    ("forgetting", "known"), ("forgetting", "engine"), ("forgetting", "ranks"), ("forgetting", "kinds"),
    ("forgetting", "normalisation"), *permutations(HYPER_MODELS, 2),
]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def imports(path: Path) -> list[str]:
    return [name for name in every_import(path) if name.startswith("know_cli")]


@cache
def every_import(path: Path) -> list[str]:
    """What a module imports, also inside functions; ``from a import b`` is ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def test_imports_go_down() -> None:
    for path in MODULES:
        own = layer("know_cli." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for name in imports(path) if own is not None else []:
            below = layer(name)
            assert below is None or below >= own, f"{path} imports {name}, which is above it"


@pytest.mark.parametrize(("importer", "imported"), NEVER, ids=" not ".join)
def test_rooms_that_have_no_door(importer: str, imported: str) -> None:
    for path in (PACKAGE / importer).rglob("*.py"):
        for name in imports(path):
            assert not f"{name}.".startswith(f"know_cli.{imported}."), f"{path} imports {name}"


def test_modules_do_not_import_in_circles() -> None:
    """Not even within a package; what a function imports when it is called counts, too."""
    known = {module_name(path): path for path in MODULES}
    graph = {
        name: {
            near for wanted in imports(path) if (near := nearest(wanted, known)) and near != name
        }
        for name, path in known.items()
    }
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def nearest(wanted: str, known: dict[str, Path]) -> str | None:
    """The module that an imported name is, or is in."""
    return next((name for name in (wanted, wanted.rpartition(".")[0]) if name in known), None)


def test_a_file_can_be_read_in_one_go() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {path: count for path, count in lines.items() if count > 420}


def test_every_error_that_is_raised_has_an_exit_code_of_its_own() -> None:
    """``KnowError`` itself has that of a bug, as no error of a user is."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                assert ast.unparse(node.exc.func) != "KnowError", f"{path}, line {node.lineno}"


def test_every_package_has_its_layer() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    assert packages | modules == set(LAYERS)


def test_tests_share_helpers_and_nothing_else() -> None:
    """Of the tests, a module may import what is in ``tests/support``; nobody imports a test."""
    for path in sorted(TESTS.rglob("*.py")):
        for name in every_import(path):
            assert not name.startswith("."), f"{path} imports {name}; write where it is"
            if name.startswith("tests."):
                assert name.startswith("tests.support."), f"{path} imports {name}"


def test_tests_mirror_the_package() -> None:
    """Every folder of tests is a package of its own: pytest tells modules of one name apart by it.

    Round trips belong to no package: they go through all of them, and through other libraries.
    """
    folders = {path.parent for path in TESTS.rglob("test_*.py")} - {TESTS}
    assert {folder.name for folder in folders} - {"round_trips"} <= set(LAYERS)
    assert all(
        (folder / "__init__.py").is_file() for folder in [TESTS, TESTS / "support", *folders]
    )
    assert not list((TESTS / "support").rglob("test_*.py"))
