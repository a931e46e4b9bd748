"""What the paper's experiments take: data, sizes, and time as far as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from know_cli.evaluation.paper.tables import PAPER_TABLES
from know_cli.evaluation.release.cost import (
    fine_tuned_examples,
    measured,
    pretrained_examples,
    pretrained_samples,
)
from know_cli.evaluation.release.plan import RELEASE_TASKS
from know_cli.evaluation.release.suite import not_here
from know_cli.evaluation.release.task import FRESH, ReleaseTask

_HOUR = 3600


@dataclass(frozen=True)
class Experiment:
    """One task of the paper, for one seed with all examples and all starts.

    Attributes:
        task: its name.
        data_sets: that it needs.
        lacking: why it cannot run here; empty if it can.
        pretrained: |D0|.
        fine_tuned: examples of each downstream condition, the largest first.
        examples: that networks are trained on, each time that they are.
        hours: of processor time for these; None if it was not measured.
    """

    task: str
    data_sets: tuple[str, ...]
    lacking: str
    pretrained: int
    fine_tuned: tuple[int, ...]
    examples: int
    hours: float | None


def experiments(data_folder: Path | None) -> list[Experiment]:
    """The paper's experiments in the order of its tables.

    Args:
        data_folder: where the data sets' files are.

    Raises:
        UsageError: the folder does not exist.
    """
    names = dict.fromkeys(name for table in PAPER_TABLES for name in table.tasks)
    tasks = [RELEASE_TASKS[name] for name in names]
    missing = not_here(tasks, data_folder)
    return [_experiment(task, missing) for task in tasks]


def _experiment(task: ReleaseTask, missing: Mapping[str, str]) -> Experiment:
    base = task.base
    starts = sum(arm.norm == FRESH and not arm.by_name for arm in task.arms({}))
    sizes = tuple(sorted((one.size for one in base.downstream), reverse=True))
    tuned = sum(fine_tuned_examples(task, size) for size in sizes)
    examples = round(pretrained_examples(task) + starts * tuned)
    seconds = measured().seconds.get(task.name)
    return Experiment(
        task.name,
        base.data_sets,
        missing.get(task.name, ""),
        pretrained_samples(task),
        sizes,
        examples,
        None if seconds is None else examples * seconds / _HOUR,
    )
