"""What the README says of all tasks of the release regime together is what was measured on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import know_cli
from know_cli.evaluation.anchors import NAIVE
from know_cli.evaluation.release import results
from know_cli.evaluation.statistics import mean_estimate

ROOT = Path(know_cli.__file__).parents[1]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    found = json.loads((ROOT / "docs" / "results" / "release.json").read_text(encoding="utf-8"))
    return results.alike(found["tasks"])[0]


@pytest.fixture(scope="module")
def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_readme_says_on_how_many_tasks_each_start_was_measured(
    tasks: dict[str, Any], readme: str
) -> None:
    found = {name: NUMBERS[one.tasks] for name, one in results.pooled(tasks, "1250 images").items()}
    pair = found["authors-x8"], found["shrink-0.5"]
    assert "tasks fine-tuned by Adam that have them ({} and {})".format(*pair) in readme
    assert f"from training longer ({found['longer']} tasks)" in readme
    assert f"that a forgetting trains longest ({found['average-forgotten-3']})" in readme
    same = {found[name] for name in ("more-data", "continuation-x8", "faithful-322-x8")}
    assert len(same) == 1
    assert f"twice the data ({min(same)}); on the same {min(same)} `continuation` has" in readme


@pytest.mark.parametrize("start", ["authors-x8", "shrink-0.5"])
def test_what_is_below_the_first_checkpoint_is_so_on_two_tasks(
    start: str, tasks: dict[str, Any], readme: str
) -> None:
    assert "nearly all of that on the transformer and on a ResNet18" in readme
    lost, others = [], []
    for name, task in tasks.items():
        cell = task["cells"]["1250 images"]
        if start in cell:
            pairs = results.paired(cell[start]["tuned"], cell[NAIVE]["tuned"])
            is_one = name in ("release-cifar10-pyramid", "release-cifar10-resnet18")
            (lost if is_one else others).extend(one - other for one, other in pairs)
    assert mean_estimate(others).low < 0 < mean_estimate(others).high
    assert sum(others) > 0.2 * sum(lost)
