"""Downstream tasks by name; a new one is a file like ``classification.py`` and its line here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from know_cli.errors import UsageError
from know_cli.evaluation.tasks import classification, domains, scenes, text
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
    )
}


def find_tasks(patterns: list[str]) -> list[Task]:
    """The tasks that names or glob patterns such as ``fashion-*`` name, in the registry's order.

    Args:
        patterns: if there are none, all tasks but the large ones.

    Raises:
        UsageError: a pattern names none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in TASKS):
            raise UsageError(f"no task {pattern!r}: there are {', '.join(TASKS)}")
    if not patterns:
        return [task for task in TASKS.values() if not task.large]
    return [
        task
        for name, task in TASKS.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
