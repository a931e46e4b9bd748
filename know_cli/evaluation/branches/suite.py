"""Runs the trials of branches and collects what they measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from know_cli import __version__
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.evaluation import jobs
from know_cli.evaluation.branches import plan
from know_cli.evaluation.branches.plan import BranchTask
from know_cli.evaluation.branches.trial import BranchTrial
from know_cli.evaluation.jobs import Trials
from know_cli.evaluation.suite import lacking
from know_cli.files import make_folder

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class BranchRequest(Trials):
    """What is to be evaluated.

    Attributes:
        length: of the runs, as a multiple of each task's own.
    """

    tasks: Sequence[BranchTask]
    length: float = 1.0


@dataclass(frozen=True)
class BranchOutcome:
    """What :meth:`~know_cli.evaluation.branches.trial.BranchTrial.run` found."""

    task: str
    seed: int
    found: dict[str, Any]


def not_here(tasks: Collection[BranchTask], data_folder: Path | None) -> dict[str, str]:
    """Tasks that cannot run because data sets are missing, with the reasons.

    Raises:
        UsageError: the folder of data sets does not exist.
    """
    return lacking({task.name: task.base.data_sets for task in tasks}, data_folder)


def evaluate(request: BranchRequest) -> Iterator[BranchOutcome]:
    """Measure every task with every seed, yielding the outcomes as they are finished.

    Results that are on disk are not computed again. Closing the iterator ends the processes.

    Raises:
        UsageError: a task lacks data.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.work)
    yield from jobs.run(_run, request)


def _run(request: BranchRequest, task: BranchTask, seed: int) -> BranchOutcome:
    trial = BranchTrial(
        task, seed, request.work, request.data_folder, request.length, request.place
    )
    return BranchOutcome(task.name, seed, trial.run())


def to_json(
    request: BranchRequest, outcomes: Sequence[BranchOutcome], not_run: Mapping[str, str]
) -> dict[str, Any]:
    """All measured values, one per seed, without anything derived from them.

    Returns:
        ``machine``; ``settings``; ``not_run``, reasons by task; and by task its ``title``,
        ``sort``, ``facts``, ``seeds``, processor ``seconds``, and in the seeds' order ``values``
        by arm and the single ``branches``.
    """
    tasks = {}
    for task in request.tasks:
        found = sorted((o for o in outcomes if o.task == task.name), key=lambda o: o.seed)
        if found:
            first = found[0].found
            tasks[task.name] = {
                "title": task.title,
                "sort": task.sort.value,
                "facts": first["facts"],
                "seeds": [one.seed for one in found],
                "seconds": [one.found["seconds"] for one in found],
                "values": {
                    arm: [one.found["values"][arm] for one in found] for arm in first["values"]
                },
                "branches": [one.found["branches"] for one in found],
            }
    return {
        "format": FORMAT,
        "trajectory": TrajectoryKind.BRANCHES.value,
        "version": __version__,
        "machine": request.place.machine(),
        "settings": {
            "seeds": request.seeds,
            "length": request.length,
            "branches": plan.BRANCHES,
            "share": plan.SHARE,
            "rate": plan.RATE,
            "classes": plan.CLASSES,
        },
        "tasks": tasks,
        "not_run": dict(not_run),
    }
