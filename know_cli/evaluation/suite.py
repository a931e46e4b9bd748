"""Runs many trials at the same time, each in a process with one thread."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from know_cli.errors import UsageError
from know_cli.evaluation.starts import Outcome, Wanted
from know_cli.evaluation.tasks import TASKS, Task
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import is_available
from know_cli.files import make_folder
from know_cli.lab.data import available
from know_cli.lab.processes import in_processes

#: Seeds of each suite; all have all tasks.
SUITES = {"small": 3, "full": 10}
#: What is trained is kept here, in the output folder.
WORK = "work"


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    Attributes:
        folder: of the output; what is trained goes into its folder ``work``.
        tasks: the tasks.
        seeds: how many of them, from 0.
        wanted: methods and settings.
        data_folder: of the data sets' files.
        processes: trials at the same time.
    """

    folder: Path
    tasks: Sequence[Task]
    seeds: int
    wanted: Wanted
    data_folder: Path | None = None
    processes: int = 1

    @property
    def work(self) -> Path:
        """Where trials keep what they train."""
        return self.folder / WORK


def not_here(request: Request) -> dict[str, str]:
    """Tasks that cannot run here, with the reason: data sets that are not found.

    Raises:
        UsageError: there is no such folder of data sets.
    """
    found = set(available(request.data_folder))
    reasons = {}
    for task in request.tasks:
        lacking = [name for name in task.data_sets if name not in found]
        if lacking:
            reasons[task.name] = f"not found here: {', '.join(lacking)}"
    return reasons


def not_asked_for(request: Request) -> dict[str, str]:
    """Large tasks that a request does not have, with what it takes to run them."""
    asked = {task.name for task in request.tasks}
    return {
        name: f"large; --task {name}, with {' and '.join(task.data_sets)} in --data-folder"
        for name, task in TASKS.items()
        if task.large and name not in asked
    }


def without(request: Request, names: Collection[str]) -> Request:
    """A request without tasks of these names."""
    return replace(request, tasks=[task for task in request.tasks if task.name not in names])


def check_methods(request: Request) -> list[str]:
    """See that every method can be used with some number of checkpoints.

    Returns:
        What is left out, in words.

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
    """Run every task with every seed, yielding what comes out of each as it is done.

    What is on disk already is not computed again. Closing the iterator, or an exception thrown
    into it, ends the processes; a trial that was at work goes on where it was when it is run
    again.

    Raises:
        UsageError: a task lacks data.
        CheckpointError: a bundle cannot be used.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.work)
    # One seed of every task before the next: what can be said early is said of all.
    jobs = [(task, seed) for seed in range(request.seeds) for task in request.tasks]
    if request.processes == 1 or len(jobs) == 1:
        for task, seed in jobs:
            yield _run(request, task, seed)
        return
    yield from in_processes(
        _run, [(request, *job) for job in jobs], request.processes, request.folder
    )


def _run(request: Request, task: Task, seed: int) -> Outcome:
    return Trial(task, seed, request.work, request.data_folder).run(request.wanted)
