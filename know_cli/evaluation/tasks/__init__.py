"""Downstream tasks by name. To add one, write a file like ``classification.py`` and a line here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from know_cli.errors import UsageError
from know_cli.evaluation.tasks import cifar, classification, domains, scenes, text
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.task import Cell, Downstream, Problem, Recipe, Task

__all__ = [
    "TASKS",
    "Cell",
    "Downstream",
    "Examples",
    "Problem",
    "Recipe",
    "Task",
    "find_tasks",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *classification.TASKS,
        *text.TASKS,
        *domains.TASKS,
        *scenes.TASKS,
        *cifar.TASKS,
        *cifar.LARGE_TASKS,
    )
}


def find_tasks(patterns: list[str]) -> list[Task]:
    """The tasks that match names or glob patterns such as ``fashion-*``, in the registry's order.

    Args:
        patterns: none stands for all tasks except the large ones.

    Raises:
        UsageError: a pattern matches no task.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in TASKS):
            raise UsageError(f"unknown task {pattern!r}; choose from {', '.join(TASKS)}")
    if not patterns:
        return [task for task in TASKS.values() if not task.large]
    return [
        task
        for name, task in TASKS.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
