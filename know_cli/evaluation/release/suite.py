"""Runs the trials of the release regime and collects what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from know_cli.evaluation import jobs
from know_cli.evaluation.jobs import Trials
from know_cli.evaluation.release.plan import chosen
from know_cli.evaluation.release.regime import SHARES
from know_cli.evaluation.release.task import OF_MORE_DATA, ReleaseTask
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.evaluation.suite import lacking
from know_cli.files import make_folder


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest(Trials):
    """What is to be evaluated.

    Attributes:
        shares: of the downstream examples, in per cent.
        methods: labels of starts or patterns of them; see :func:`chosen`.
        bundles: paths of further bundles, by name.
        first: checkpoint of a Θ0 that is trained already; None trains it.
    """

    tasks: Sequence[ReleaseTask]
    shares: Sequence[int] = SHARES
    methods: Sequence[str] = ()
    bundles: Mapping[str, str] = field(default_factory=dict)
    first: Path | None = None


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
    make_folder(request.work)
    yield from jobs.run(_run, request)


def _run(request: ReleaseRequest, task: ReleaseTask, seed: int) -> ReleaseOutcome:
    trial = ReleaseTrial(
        task, seed, request.work, request.data_folder, request.place, request.first
    )
    arms = task.arms(request.bundles)
    if request.first is not None:
        arms = [arm for arm in arms if arm.name not in OF_MORE_DATA]
    trial.run(chosen(arms, request.methods), request.shares)
    return ReleaseOutcome(task.name, seed, trial.found(arms, SHARES), trial.computed)
