"""What a result of the evaluation is keyed by."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import know_cli
from know_cli.evaluation import cache

_LOADED = """
import importlib, json, sys
from know_cli.methods.registry import METHODS
for module in ("know_cli.prediction.predict", *(method.module for method in METHODS)):
    importlib.import_module(module)
print(json.dumps([name.split(".")[1] for name in sys.modules if name.startswith("know_cli.")]))
"""


def test_all_code_that_predicts_counts() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, check=True)
    counted = {name.removesuffix(".py") for name in cache._PREDICTING}
    assert set(json.loads(done.stdout)) <= counted


def test_a_change_of_code_in_either_language_makes_another_key(tmp_path: Path) -> None:
    copy = tmp_path / "know_cli"
    shutil.copytree(Path(know_cli.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so"))

    def key() -> str:
        code = "from know_cli.evaluation.cache import code_key; print(code_key())"
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, capture_output=True, check=True, text=True, cwd=tmp_path
        ).stdout

    before = key()
    assert key() == before
    keys = {before}
    for name in ("passes/passes.c", "passes/numbers.py", "known/native_kernel.c", "roles.py"):
        with (copy / name).open("a") as file:
            file.write("\n")
        keys.add(key())
    assert len(keys) == 5
    with (copy / "plots" / "plane.py").open("a") as file:
        file.write("\n")
    assert key() in keys
