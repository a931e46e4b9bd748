"""Where evaluations and collections train: devices in turn, and the same protocol on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from know_cli.evaluation import cache, jobs
from know_cli.evaluation.branches.plan import find_branch_tasks
from know_cli.evaluation.branches.trial import BranchTrial
from know_cli.evaluation.jobs import Trials
from know_cli.evaluation.runs.trial import RunTrial
from know_cli.evaluation.starts import Wanted
from know_cli.evaluation.tasks import TASKS, Downstream
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import find_variants
from know_cli.lab.data import available, load
from know_cli.meta.collecting import Request
from know_cli.meta.collecting import collect as collect_trajectories
from know_cli.meta.run_collecting import RunRequest, collect_runs
from tests.support.command import Command, one_line

CARDS = tuple(torch.device("cuda", number) for number in range(3))
_TASK = TASKS["glyphs-alphabets-cnn"]
TINY = replace(
    _TASK,
    samples=34,
    recipe=replace(_TASK.recipe, epochs=1, batch_size=16),
    downstream=(Downstream(8, 1, repetitions=1),),
    tested=40,
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def _seen(request: Trials, extra: str, task: str, seed: int) -> tuple[str, str, int, str]:
    return extra, task, seed, str(request.device)


def test_trials_take_the_devices_in_turn(tmp_path: Path) -> None:
    request = Trials(folder=tmp_path, tasks=["a", "b"], seeds=2, devices=CARDS)
    found = list(jobs.run(_seen, request, "shared"))
    assert found == [
        ("shared", "a", 0, "cuda:0"),
        ("shared", "b", 0, "cuda:1"),
        ("shared", "a", 1, "cuda:2"),
        ("shared", "b", 1, "cuda:0"),
    ]


def test_what_another_processor_trained_has_another_key() -> None:
    cpu, *others = (cache.place(torch.device(name)) for name in ("cpu", "cuda:0", "mps"))
    assert cpu == []  # as before there was a choice
    assert len({cache.key("trial", *place) for place in (cpu, *others)}) == 3
    assert cache.place(CARDS[0]) == cache.place(CARDS[1])


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "-o", "out"),
        ("eval", "-o", "out", "--trajectory", "run"),
        ("eval", "-o", "out", "--trajectory", "branches"),
        ("eval", "-o", "out", "--regime", "release"),
        ("collect", "out"),
        ("collect", "out", "--regime", "run"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    arguments: tuple[str, ...], tmp_path: Path, know: Command
) -> None:
    done = know(*arguments, "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 2
    assert "--device cuda:99: torch sees" in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


@needs_cuda
def test_a_forgetting_is_measured_on_a_card(tmp_path: Path) -> None:
    wanted = Wanted(tuple(find_variants(["continuation"])), steps=1)
    first = Trial(TINY, 1, tmp_path, None, CARDS[0])
    assert first.problem.pool.inputs.is_cuda
    outcome = first.run(wanted)
    again = Trial(TINY, 1, tmp_path, None, CARDS[0]).run(wanted)
    assert again.computed == 0
    assert again.values == outcome.values
    assert Trial(TINY, 1, tmp_path, None).key != first.key


@needs_cuda
def test_runs_and_branches_are_measured_on_a_card(tmp_path: Path) -> None:
    run = RunTrial(TINY, 0, tmp_path, None, 0.2, CARDS[0])
    assert set(run.pretraining()["values"]) >= {"last", "average-5"}
    for name in ("orders-glyphs-*", "tasks-*"):
        task = find_branch_tasks([name])[0]
        found = BranchTrial(task, 0, tmp_path, None, 0.02, CARDS[0]).run()
        assert len(found["branches"]) > 1


@needs_cuda
def test_trajectories_and_runs_are_collected_on_a_card(tmp_path: Path) -> None:
    assert "digits" in available()
    assert load("digits").classes == 10
    device = CARDS[0]
    request = Request(
        tmp_path / "a", 2, ["digits"], architectures=["mlp", "cnn"], device=device
    )  # fmt: skip
    assert [one.reason for one in collect_trajectories(request)] == ["", ""]
    runs = RunRequest(tmp_path / "b", 1, ["digits"], architectures=["cnn"], device=device)
    assert [one.reason for one in collect_runs(runs)] == [""]
