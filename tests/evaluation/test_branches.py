"""``know eval --trajectory branches``: what is grown, fused and compared, on next to no data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from know_cli.errors import UsageError
from know_cli.evaluation.branches import plan, suite
from know_cli.evaluation.branches import trial as protocol
from know_cli.evaluation.branches.markdown import gain, to_markdown
from know_cli.evaluation.branches.plan import BranchTask, Sort, find_branch_tasks
from know_cli.evaluation.branches.trial import BranchTrial
from know_cli.evaluation.runs import plan as run_plan
from know_cli.evaluation.tasks import TASKS, Downstream, Examples, Task
from know_cli.evaluation.tasks import classification as classifying
from know_cli.evaluation.tasks.classification import Classification
from know_cli.lab.averaging import combine
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training
from tests.support.command import Command, one_line

CLASSES = 30


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise in many classes instead of images, and no task's own length of run."""

    def noise(name: str, folder: Path | None) -> tuple[Examples, Examples, int]:
        generator = torch.Generator().manual_seed(len(name))
        train, test = (
            Examples(torch.randn(n, 1, 16, 16, generator=generator), torch.arange(n) % CLASSES)
            for n in (1200, 300)
        )
        return train, test, CLASSES

    monkeypatch.setattr(classifying, "load_images", noise)
    monkeypatch.setattr(run_plan, "_LENGTHS", {})
    monkeypatch.setattr(run_plan, "RATES", (1.0, 2.0))
    monkeypatch.setattr(protocol.plan, "BRANCHES", 3)
    with one_thread():
        yield


def tiny(sort: Sort) -> BranchTask:
    name = "glyphs-alphabets-resnet" if sort is Sort.TASKS else "glyphs-alphabets-cnn"
    task: Task = replace(
        TASKS[name],
        samples=40,
        recipe=replace(TASKS[name].recipe, epochs=3, batch_size=16),
        downstream=(Downstream(8, 1, 1e-3, repetitions=1),),
        tested=24,
    )
    return BranchTask(sort, task)


@pytest.mark.parametrize("sort", Sort)
def test_a_trial_measures_every_arm_and_is_found_again(sort: Sort, tmp_path: Path) -> None:
    found = BranchTrial(tiny(sort), 1, tmp_path, None).run()
    ends = {plan.MULTI_TASK} if sort is Sort.TASKS else {plan.LONGER, plan.ANNEALED}
    assert set(found["values"]) == {plan.NAIVE, plan.BRANCH, plan.BEST, plan.FUSED} | ends
    assert len(found["branches"]) == 3
    assert found["values"][plan.BEST] == max(found["branches"])
    assert found["values"][plan.BRANCH] == pytest.approx(np.mean(found["branches"]), abs=1e-5)
    # 80 samples (64 of four classes) in batches of 16, three times, and a fifth of that.
    assert found["facts"]["steps"] == (12 if sort is Sort.TASKS else 15)
    assert found["facts"]["branch_steps"] == (2 if sort is Sort.TASKS else 3)

    class Untrained(BranchTrial):
        def _run(self) -> dict[str, Any]:
            raise AssertionError("trained again")

    assert Untrained(tiny(sort), 1, tmp_path, None).run() == found
    with pytest.raises(AssertionError):
        Untrained(tiny(sort), 2, tmp_path, None).run()


@pytest.mark.parametrize("sort", [Sort.ORDERS, Sort.SUBSETS])
def test_branches_go_on_from_the_run_and_are_averaged(
    sort: Sort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that are measured, against trainings of the test's own."""
    measured: list[dict[str, torch.Tensor]] = []
    trial = BranchTrial(tiny(sort), 4, tmp_path, None)
    monkeypatch.setattr(
        BranchTrial, "_value", lambda self, state: measured.append(dict(state)) or 0.5
    )
    seen: list[int] = []
    branching = Training.branch

    def noting(self: Training, seed: int | None = None, chosen: Any = None) -> Training:
        if chosen is not None:
            seen.append(len(set(chosen.tolist())))
        return branching(self, seed, chosen)

    monkeypatch.setattr(Training, "branch", noting)
    trial.run()
    *branches, start, fused, longer, annealed = measured
    assert len(branches) == 3
    assert seen == ([40] * 3 if sort is Sort.SUBSETS else [])
    for name, tensor in combine(branches, [1 / 3] * 3).items():
        assert torch.equal(fused[name], tensor)
    everything = [*branches, start, longer, annealed]
    for one, other in itertools.pairwise(everything):
        assert any(not torch.equal(one[name], other[name]) for name in one)
    # Nobody but the continuation of all steps goes as far from Θ0.
    distance = {
        number: sum(float((state[name] - start[name]).square().sum()) for name in start)
        for number, state in enumerate((*branches, longer))
    }
    assert max(distance, key=lambda number: distance[number]) == 3


def test_classes_of_other_tasks_are_in_no_other_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str, folder: Path | None) -> tuple[Examples, Examples, int]:
        # The one pixel of each image is the number of its class.
        labels = torch.arange(10 * CLASSES) % CLASSES
        images = Examples(labels.float().reshape(-1, 1, 1, 1), labels)
        return images, images, CLASSES

    monkeypatch.setattr(classifying, "load_images", named)
    task = tiny(Sort.TASKS).base
    assert isinstance(task, Classification)
    task = replace(task, source_classes=4, samples=8)
    own = set(task.prepare(3, None).pool.inputs.flatten().tolist())
    splits = task.further_splits(3, None, 5)
    assert len(splits) == 5
    sets = [set(split.inputs.flatten().tolist()) for split in splits]
    assert all(len(one) == 4 for one in sets)
    assert len(own.union(*sets)) == len(own) + 20
    for split in splits:
        # Each class is one label, from 0.
        pairs = set(zip(split.inputs.flatten().tolist(), split.targets.tolist(), strict=True))
        assert sorted(label for _, label in pairs) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="7 further splits of 4 classes need 32 classes"):
        task.further_splits(3, None, 7)


def results(**values: list[float]) -> dict[str, Any]:
    measure = {"name": "accuracy", "unit": "points", "scale": 100.0}
    facts = {
        "parameters": 10, "samples": 80, "steps": 15, "branch_steps": 3, "tested": 24,
        "measure": measure, "downstream": "",
    }  # fmt: skip
    count = len(values["naive"])
    task = {
        "title": "noise", "sort": "orders", "facts": facts, "seeds": list(range(count)),
        "seconds": [1.0] * count, "values": values, "branches": [[0.5]] * count,
    }  # fmt: skip
    settings = {"seeds": count, "length": 1, "branches": 5, "share": 0.2, "rate": 0.5, "classes": 4}
    return {
        "machine": {"processor": "x", "cores": 2, "system": "y", "python": "3", "torch": "2"},
        "version": "0", "settings": settings, "tasks": {"noise": task}, "not_run": {"other": "why"},
    }  # fmt: skip


def test_the_page_says_what_the_numbers_say() -> None:
    found = results(
        naive=[0.50, 0.60, 0.70],
        branch=[0.55, 0.61, 0.78],
        **{"best branch": [0.52, 0.63, 0.70]},
        average=[0.54, 0.63, 0.75],
        longer=[0.60, 0.69, 0.80],
    )
    # Differences 4, 3, 5 points: mean 4, standard deviation 1, t(2) = 4.3027, over √3.
    estimate = gain(found["tasks"]["noise"], "average", "naive")
    assert estimate.value == pytest.approx(0.04)
    assert estimate.half_width == pytest.approx(0.043027 / 3**0.5 * 1, rel=1e-3)
    page = to_markdown(found)
    assert "1 task, 3 seeds each, from 0" in page
    found["tasks"]["noise"]["seeds"] = [5, 6, 7]  # --seeds 5-7
    assert "1 task, 3 seeds each, from 5" in to_markdown(found)
    assert "| average | 64.00 | +4.00 ± 2.48 |  |" in page
    assert "| longer | 69.67 | +9.67 ± 1.43 | -5.67 ± 1.43 |" in page
    assert (
        "Against Θ0, the mean of the branches is significantly better on `noise`, "
        "significantly worse on none, of 1." in page
    )
    assert "| other | why |" in page
    assert "on all tasks at once, it is" not in page


def test_outcomes_become_results_in_the_order_of_seeds(tmp_path: Path) -> None:
    request = suite.BranchRequest(folder=tmp_path, tasks=[tiny(Sort.ORDERS)], seeds=2)
    outcomes = list(suite.evaluate(request))
    assert [outcome.seed for outcome in outcomes] == [0, 1]
    content = json.loads(json.dumps(suite.to_json(request, outcomes[::-1], {})))
    task = content["tasks"]["orders-glyphs-alphabets-cnn"]
    assert task["seeds"] == [0, 1]
    assert task["values"]["average"] == [o.found["values"]["average"] for o in outcomes]
    assert "# What fusing branches is worth" in to_markdown(content)


def test_tasks_are_found_by_pattern_and_run_where_their_data_are() -> None:
    assert [task.name for task in find_branch_tasks(["tasks-*"])] == [
        "tasks-glyphs-alphabets-resnet"
    ]
    assert len(find_branch_tasks([])) == len(plan.BRANCH_TASKS)
    with pytest.raises(UsageError, match="no task of branches is named 'nothing'; choose from ord"):
        find_branch_tasks(["nothing"])
    tasks = find_branch_tasks([])
    assert {task.sort for task in tasks} == set(Sort)
    lacking = suite.not_here(tasks, None)
    assert lacking["orders-cifar10-classes-resnet"] == "not found here: cifar10"
    assert "tasks-glyphs-alphabets-resnet" not in lacking


def test_the_command_refuses_what_has_no_effect(tmp_path: Path, know: Command) -> None:
    for arguments, words in (
        (["--measure", "cosine"], "--measure is for --trajectory run"),
        (["--steps", "2"], "--steps is for --trajectory forgetting, not for branches"),
        (["--task", "nothing"], "no task of branches is named 'nothing'"),
        (["--task", "orders-cifar10*"], "none of these tasks can run here"),
    ):
        done = know("eval", "--trajectory", "branches", *arguments, "-o", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert words in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    path = Path(plan.__file__).parents[3] / "docs" / "results" / "branches.json"
    assert to_markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
