"""Runs many trials in parallel, each in a process with one thread."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from know_cli.errors import UsageError
from know_cli.evaluation import jobs
from know_cli.evaluation.chosen import choose_starts
from know_cli.evaluation.jobs import Trials
from know_cli.evaluation.starts import Outcome, Wanted
from know_cli.evaluation.tasks import TASKS, Task
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import is_available
from know_cli.files import make_folder
from know_cli.lab.data import available
from know_cli.lab.pictures import found_pictures

#: Number of seeds of each suite; every suite has all tasks.
SUITES = {"small": 3, "full": 10}


@dataclass(frozen=True, kw_only=True)
class Request(Trials):
    """What is to be evaluated.

    Attributes:
        wanted: methods and settings.
    """

    tasks: Sequence[Task]
    wanted: Wanted


def not_here(request: Request) -> dict[str, str]:
    """Tasks that cannot run because data sets are missing, with the reasons.

    Raises:
        UsageError: the folder of data sets does not exist.
    """
    return lacking({task.name: task.data_sets for task in request.tasks}, request.data_folder)


def lacking(needs: Mapping[str, Sequence[str]], data_folder: Path | None) -> dict[str, str]:
    """Tasks whose data sets are not all here, with the reasons.

    Args:
        needs: names of data sets by the task's name.
        data_folder: where the data sets' files are.

    Raises:
        UsageError: the folder of data sets does not exist.
    """
    here = {*available(data_folder), *found_pictures(data_folder)}
    missing = {task: [name for name in of if name not in here] for task, of in needs.items()}
    return {task: f"not found here: {', '.join(of)}" for task, of in missing.items() if of}


def not_asked_for(request: Request) -> dict[str, str]:
    """Large tasks that a request does not include, with what it takes to run them."""
    asked = {task.name for task in request.tasks}
    return {
        name: f"large; --task {name}{_with(task.data_sets)}"
        for name, task in TASKS.items()
        if task.large and name not in asked
    }


def _with(data_sets: Sequence[str]) -> str:
    return f", with {' and '.join(data_sets)} in --data-folder" if data_sets else ""


def without(request: Request, names: Collection[str]) -> Request:
    """The request without tasks of these names."""
    return replace(request, tasks=[task for task in request.tasks if task.name not in names])


def check_methods(request: Request) -> list[str]:
    """Check that every method can read at least one of the numbers of checkpoints.

    Returns:
        Sentences that say which combinations are left out.

    Raises:
        UsageError: a bundle does not exist, or a method reads none of these numbers.
        CheckpointError: a bundle is corrupt.
    """
    left_out = []
    for variant in request.wanted.variants:
        lacking = [count for count in request.wanted.sessions if not is_available(variant, count)]
        if len(lacking) == len(request.wanted.sessions):
            raise UsageError(
                f"method {variant.label!r}: cannot read {', '.join(map(str, lacking))} checkpoints"
            )
        left_out += [f"{variant.label} cannot read {count} checkpoints" for count in lacking]
    return left_out


def evaluate(request: Request) -> Iterator[Outcome]:
    """Run every task with every seed, yielding the outcomes as they are finished.

    Results that are on disk are not computed again. Closing the iterator, or throwing an exception
    into it, ends the processes; an interrupted trial continues where it stopped when it is run
    again.

    Raises:
        UsageError: a task lacks data.
        CheckpointError: a bundle cannot be used.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.work)
    yield from jobs.run(_run, request)


def _run(request: Request, task: Task, seed: int) -> Outcome:
    trial = Trial(task, seed, request.work, request.data_folder, request.place)
    return trial.run(request.wanted, choose_starts)
