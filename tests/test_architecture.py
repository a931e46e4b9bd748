"""The design, kept: the direction of imports, what is at the top, and the dependencies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "know_cli"
# From the top of the data flow down; a module imports only from its own layer and those below.
LAYERS = [
    "cli", "benchmark", "evaluation", "meta", "forgetting", "methods", "engine", "hypermodel", "checkpoints",
    "behaviour", "kinds", "structure", "normalisation", "sources", "pairs", "roles", "names",
    "bundles", "processes", "files", "errors",
]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith("know_cli")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = layer("know_cli." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if own is None:
        return
    for name in imports(path):
        below = layer(name)
        assert below is None or below >= own, f"{path} imports {name}, which is above it"


def test_every_package_has_its_layer() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    assert packages | modules == set(LAYERS)
