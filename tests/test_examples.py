"""The examples in docstrings are run, as they stand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import know_cli

PACKAGE = Path(know_cli.__file__).parent
PROMPT = ">>> "
MODULES = sorted(
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    for path in PACKAGE.rglob("*.py")
    if PROMPT in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted > 0
    assert done.failed == 0


def test_no_example_is_left_out() -> None:
    """What is shown is run: none has a mark that skips it."""
    assert not [name for name in MODULES if "doctest: +SKIP" in source(name)]


def source(name: str) -> str:
    path = PACKAGE.parent / (name.replace(".", "/") + ".py")
    return path.read_text(encoding="utf-8")
