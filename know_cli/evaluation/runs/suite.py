"""Runs many trials, one measure after the other, and collects what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from know_cli.evaluation import jobs
from know_cli.evaluation.runs.measures import RunMeasure
from know_cli.evaluation.runs.trial import DOWNSTREAM, RunTrial
from know_cli.evaluation.suite import Request
from know_cli.evaluation.tasks import Task
from know_cli.files import make_folder


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of one task with one seed.

    Attributes:
        task: name of the task.
        seed: of the trial.
        found: as :meth:`~know_cli.evaluation.runs.trial.RunTrial.found` returns it.
    """

    task: str
    seed: int
    found: dict[str, Any]


def evaluate(
    request: Request,
    measures: Sequence[RunMeasure],
    length: float = 1.0,
    bundles: Mapping[str, str] | None = None,
) -> Iterator[RunOutcome]:
    """Measure every task with every seed, yielding the outcomes as they are finished.

    Results that are on disk are not computed again, and an outcome has all that are there,
    whether they were asked for or not. Closing the iterator ends the processes.

    Args:
        request: tasks, seeds and folders.
        measures: what to measure.
        length: of the runs, as a multiple of each task's own.
        bundles: paths of bundles, by name, which are measured with the pre-training's measure.

    Raises:
        UsageError: a task lacks data.
        CheckpointError: a bundle cannot be used.
        OutputError: the folder cannot be written, or a process was killed.
    """
    make_folder(request.work)
    yield from jobs.run(_run, request, measures, length, dict(bundles or {}))


def _run(
    request: Request,
    measures: Sequence[RunMeasure],
    length: float,
    bundles: Mapping[str, str],
    task: Task,
    seed: int,
) -> RunOutcome:
    trial = RunTrial(task, seed, request.work, request.data_folder, length, request.place)
    if RunMeasure.PRETRAINING in measures or RunMeasure.DOWNSTREAM in measures:
        trial.pretraining()
    if RunMeasure.PRETRAINING in measures:
        for name, path in bundles.items():
            trial.bundle(name, path)
        if bundles:
            trial.spaced()
    if RunMeasure.COSINE in measures:
        trial.cosine()
    if RunMeasure.FALLING in measures:
        trial.falling()
    if RunMeasure.DOWNSTREAM in measures:
        for start in DOWNSTREAM:
            trial.downstream(start)
    return RunOutcome(task.name, seed, trial.found(bundles))
