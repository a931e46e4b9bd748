"""Fine-tuning from a start at the rate that validation chooses for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from know_cli.evaluation.runs import plan
from know_cli.evaluation.tasks import Cell, Problem
from know_cli.evaluation.tasks.task import permutation, train
from know_cli.evaluation.weights import load
from know_cli.forgetting.recorder import derived_seed

# Random streams of one seed.
_HEAD, _DRAW, _FINE_TUNE = range(72, 75)


def middle_cell(problem: Problem) -> Cell:
    """The downstream condition that is measured: the middle one of the problem's."""
    return problem.cells[(len(problem.cells) - 1) // 2]


def tuned_value(problem: Problem, state: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    """The downstream value of a start at the best of :data:`~.plan.RATES`, by validation.

    Args:
        problem: with the downstream conditions.
        state: the start.
        seed: of the examples, the head and the order.

    Returns:
        ``value``, the chosen ``factor``, ``validation`` by factor, the ``cell``, and the numbers
        ``validated`` and ``tested``.
    """
    cell = middle_cell(problem)
    order = permutation(len(cell.pool), derived_seed(seed, _DRAW))
    chosen = cell.pool.take(order[: cell.downstream.size])
    validation = cell.pool.take(order[cell.downstream.size :][: plan.VALIDATION])
    recipe = cell.downstream.recipe
    scores, best = {}, (-math.inf, 0.0, 0.0)
    for factor in plan.RATES:
        model = problem.build_downstream(derived_seed(seed, _HEAD))
        load(model, state, problem.fresh)
        tuned = replace(recipe, learning_rate=factor * recipe.learning_rate)
        train(model, chosen, tuned, derived_seed(seed, _FINE_TUNE))
        score = round(problem.measure.function(model, validation), 6)
        scores[f"{factor:g}"] = score
        if score > best[0]:
            value = round(problem.measure.function(model, cell.test), 6)
            best = (score, factor, value)
    return {
        "value": best[2],
        "factor": best[1],
        "validation": scores,
        "cell": cell.name,
        "validated": len(validation),
        "tested": len(cell.test),
    }
