"""Evaluation tasks with next to no data and training."""

from __future__ import annotations

from dataclasses import replace

from know_cli.evaluation.tasks import TASKS, Downstream, Recipe, Task


def tiny(name: str) -> Task:
    """A task as it is, but with next to no data and training."""
    task = TASKS[name]
    changes = {"base_samples": 32, "base_recipe": Recipe(1, 1e-3)} if hasattr(task, "base") else {}
    return replace(
        task,
        samples=34,
        recipe=replace(task.recipe, epochs=1, batch_size=16),
        downstream=(Downstream(8, 1, repetitions=1),),
        tested=40,
        **changes,
    )
