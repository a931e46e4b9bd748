"""The trials of an evaluation: which there are, and how they are run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from know_cli.evaluation.place import Place
from know_cli.evaluation.precision import Precision
from know_cli.lab.machine import CPU
from know_cli.lab.processes import in_processes

Outcome = TypeVar("Outcome")


#: Folder for everything that is trained, in the output folder.
WORK = "work"


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What every evaluation is asked for.

    Attributes:
        folder: for the output; everything that is trained goes into its folder ``work``.
        tasks: to run.
        seeds: number of seeds.
        first_seed: the others follow.
        data_folder: where the data sets' files are.
        processes: number of trials at the same time.
        devices: where networks are trained; trials take them in turn.
        precision: in which networks compute.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
    """

    folder: Path
    tasks: Sequence[Any]
    seeds: int
    data_folder: Path | None = None
    processes: int = 1
    devices: tuple[torch.device, ...] = (CPU,)
    precision: Precision = Precision.FLOAT32
    shard: tuple[int, int] = (0, 1)
    first_seed: int = 0

    @property
    def work(self) -> Path:
        """The folder of everything that trials train."""
        return self.folder / WORK

    @property
    def place(self) -> Place:
        """Where a trial trains: of what it is given the only device."""
        return Place(self.devices[0], self.precision)


def jobs(request: Trials) -> list[tuple[Any, int]]:
    """Tasks and seeds of a shard's trials.

    All tasks with one seed before the next seed, so that early results cover every task.
    """
    index, count = request.shard
    seeds = range(request.first_seed, request.first_seed + request.seeds)
    every = [(task, seed) for seed in seeds for task in request.tasks]
    return every[index::count]


def run(function: Callable[..., Outcome], request: Trials, *shared: Any) -> Iterator[Outcome]:
    """Run all trials of a shard, yielding their outcomes as they are finished.

    Args:
        function: runs one, given the request with the trial's device alone, what is shared, a
            task and a seed; defined at the top of a module, so that a process can import it.
        request: which trials.
        shared: other arguments.

    Raises:
        OutputError: a process was killed.
    """
    single = [replace(request, devices=(device,)) for device in request.devices]
    wanted = [
        (single[number % len(single)], *shared, *job) for number, job in enumerate(jobs(request))
    ]
    if request.processes == 1 or len(wanted) <= 1:
        yield from (function(*arguments) for arguments in wanted)
        return
    yield from in_processes(function, wanted, request.processes, request.folder)
