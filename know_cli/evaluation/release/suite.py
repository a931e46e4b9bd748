"""Runs the trials of the release regime and collects what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from know_cli.evaluation import jobs
from know_cli.evaluation.release.plan import ReleaseTask, chosen
from know_cli.evaluation.release.regime import SHARES
from know_cli.evaluation.release.trial import CPU, ReleaseTrial
from know_cli.evaluation.suite import WORK, lacking
from know_cli.files import make_folder


@dataclass(frozen=True)
class ReleaseRequest:
    """What is to be evaluated.

    Attributes:
        folder: for the output; what trials train and find goes into its folder ``work``.
        tasks: to run.
        seeds: number of seeds, from 0.
        shares: of the downstream examples, in per cent.
        methods: labels of starts or patterns of them; none for all.
        bundles: paths of further KNOWN bundles, by name.
        data_folder: where the data sets' files are.
        processes: number of trials at the same time.
        device: where networks are trained.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
    """

    folder: Path
    tasks: Sequence[ReleaseTask]
    seeds: int
    shares: Sequence[int] = SHARES
    methods: Sequence[str] = ()
    bundles: Mapping[str, str] = field(default_factory=dict)
    data_folder: Path | None = None
    processes: int = 1
    device: torch.device = CPU
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class ReleaseOutcome:
    """The outcome of one task with one seed.

    Attributes:
        task: name of the task.
        seed: of the trial.
        found: as :meth:`~know_cli.evaluation.release.trial.ReleaseTrial.found` returns it, of every
            start and condition, whether it was asked for or not.
        computed: number of trainings, predictions and fine-tunings of this run.
    """

    task: str
    seed: int
    found: dict[str, Any]
    computed: int


def not_here(tasks: Collection[ReleaseTask], data_folder: Path | None) -> dict[str, str]:
    """Tasks that cannot run because data sets are missing, with the reasons.

    Raises:
        UsageError: the folder of data sets does not exist.
    """
    return lacking({task.name: task.base.data_sets for task in tasks}, data_folder)


def evaluate(request: ReleaseRequest) -> Iterator[ReleaseOutcome]:
    """Measure every task with every seed, yielding the outcomes as they are finished.

    All tasks are measured with one seed before the next, so that what is there is comparable
    whenever it is interrupted. Closing the iterator ends the processes.

    Raises:
        UsageError: a task lacks data.
        CheckpointError: a bundle cannot be used.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.folder / WORK)
    yield from jobs.run(_run, request)


def _run(request: ReleaseRequest, task: ReleaseTask, seed: int) -> ReleaseOutcome:
    trial = ReleaseTrial(task, seed, request.folder / WORK, request.data_folder, request.device)
    arms = task.arms(request.bundles)
    trial.run(chosen(arms, request.methods), request.shares)
    return ReleaseOutcome(task.name, seed, trial.found(arms, SHARES), trial.computed)
