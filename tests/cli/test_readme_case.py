"""The case in the README, from a recording to a start, with fewer steps and measures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from know_cli.choosing.measures import FunctionMeasure, Result
from know_cli.choosing.worker import answer, check_function
from know_cli.errors import EXIT_DONE
from know_cli.lab.fitting import one_thread
from tests.support.command import Command
from tests.support.pages import PAGE, documented

README = PAGE.parents[1] / "README.md"


@pytest.fixture
def _own_modules() -> Iterator[None]:
    """Other examples have a module of the same name."""
    before = sys.modules.pop("train", None)
    yield
    sys.modules.pop("train", None)
    if before is not None:
        sys.modules["train"] = before


@pytest.mark.usefixtures("_own_modules")
def test_the_case_of_the_readme_works(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(
        measure: FunctionMeasure, start: Path, seed: int, values: Mapping[str, str], slot: int
    ) -> Result:
        with one_thread():
            found = answer(check_function("measure.py:accuracy", ("lr",)), start, seed, values)
        return Result(float(found["value"]))

    monkeypatch.setattr(FunctionMeasure, "take", take)  # in this process, which is quicker
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = documented("train.py", README)
    (tmp_path / "train.py").write_text(code.replace("20, 1e-2", "6, 1e-2"))
    measure = documented("measure.py", README)
    (tmp_path / "measure.py").write_text(measure.replace("20, float", "1, float"))
    with one_thread():  # networks this small are slower on several
        recorded = compile((tmp_path / "train.py").read_text(), "train.py", "exec")
        exec(recorded, {"__name__": "__main__"})
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [f"checkpoint-{epoch}.safetensors" for epoch in range(2, 7)]
    done = know(
        "choose", "run", "--trajectory", "run", "-o", "start.safetensors",
        "--evaluate", "measure.py:accuracy", "--candidate", "average", "--tune", "lr=1e-3,1e-2",
        "--budget", 16, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    report = json.loads((tmp_path / "start.safetensors.search" / "report.json").read_text())
    assert {one["start"] for one in report["candidates"]} == {"theta0", "average"}
    done = know("plot", "choose", "start.safetensors.search", "-o", "candidates.png", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
