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


def test_the_expectations_say_on_how_many_tasks_each_start_was_measured(
    tasks: dict[str, Any],
) -> None:
    page = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").replace("−", "-")
    page = " ".join(page.split())
    found = results.pooled(tasks, "1250 images")

    def said(name: str, digits: int = 2) -> str:
        of = found[name].tuned
        return f"{100 * of.value:+.{digits}f} ± {100 * of.half_width:.{digits}f}"

    def count(name: str) -> str:
        return NUMBERS[found[name].tasks]

    others = {n: task for n, task in tasks.items() if n != "release-cifar10-fashion-resnet"}
    without = results.pooled(others, "1250 images")["longer"].tuned
    assert (
        f"training longer leaves {said('longer')} ({count('longer')} tasks; "
        f"{100 * without.value:+.2f} ± {100 * without.half_width:.2f} without the one to Fashion-MNIST)"
    ) in page
    mean, five = "average-forgotten-3", "average"
    assert (
        f"for as many steps, {said(mean)} ({count(mean)}), the mean of the five {said(five)} "
        f"({count(five)}), `continuation` {said('continuation-x8')} ({count('continuation-x8')})"
    ) in page
    below = {name: said(name, 1).removeprefix("-") for name in ("authors-x8", "shrink-0.5")}
    assert (
        "the authors' release is significantly *below* Θ0, by {} ({}), half the weights by {} ({}), "
        "nearly all of it on the transformer and on the release's ResNet18"
    ).format(*(text for name in below for text in (below[name], count(name)))) in page
    assert f"twice the data gives {said('more-data')} ({count('more-data')})." in page
    faithful = said("faithful-322-x8").removeprefix("-")
    assert f"over the three at the tuned one by {faithful}: the session before" in page
    older = found["faithful-x8"]
    texts = [
        f"{100 * of.value:+.1f} ± {100 * of.half_width:.1f}" for of in (older.own, older.tuned)
    ]
    assert "gains nothing ({}, {}, five seeds)".format(*texts) in page


def test_what_was_taught_is_told_with_its_trials(tasks: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").replace("−", "-")
    of_three = {n: tasks[f"release-cifar10-{n}"] for n in ("resnet", "cnn", "pyramid")}
    found = results.pooled(of_three, "1250 images")
    names = ("taught-331", "taught-elements-331", "average-forgotten-3")
    texts = [
        f"{100 * found[n].tuned.value:+.2f} ± {100 * found[n].tuned.half_width:.2f}" for n in names
    ]
    assert [found[name].trials for name in names] == [25, 15, 30]
    assert (
        "the first is {} points above Θ0 (25 trials), the richer one {} (15), and the plain mean of "
        "the three {} (30 trials;"
    ).format(*texts) in " ".join(page.split())
