"""The trials of an evaluation: which there are, and how they are run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from know_cli.lab.processes import in_processes

Outcome = TypeVar("Outcome")


class Trials(Protocol):
    """What every evaluation is asked for.

    Attributes:
        folder: for the output.
        tasks: to run.
        seeds: number of seeds, from 0.
        processes: number of trials at the same time.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
    """

    @property
    def folder(self) -> Path:
        """For the output."""

    @property
    def tasks(self) -> Sequence[Any]:
        """Tasks to run."""

    @property
    def seeds(self) -> int:
        """Number of seeds, from 0."""

    @property
    def processes(self) -> int:
        """Number of trials at the same time."""

    @property
    def shard(self) -> tuple[int, int]:
        """The trials i, i + n, i + 2n, … are run."""


def jobs(request: Trials) -> list[tuple[Any, int]]:
    """Tasks and seeds of a shard's trials.

    All tasks with one seed before the next seed, so that early results cover every task.
    """
    index, count = request.shard
    every = [(task, seed) for seed in range(request.seeds) for task in request.tasks]
    return every[index::count]


def run(function: Callable[..., Outcome], request: Trials, *shared: Any) -> Iterator[Outcome]:
    """Run all trials of a shard, yielding their outcomes as they are finished.

    Args:
        function: runs one, given the request, what is shared, a task and a seed; defined at the
            top of a module, so that a process can import it.
        request: which trials.
        shared: other arguments.

    Raises:
        OutputError: a process was killed.
    """
    wanted = [(request, *shared, *job) for job in jobs(request)]
    if request.processes == 1 or len(wanted) <= 1:
        yield from (function(*arguments) for arguments in wanted)
        return
    yield from in_processes(function, wanted, request.processes, request.folder)
