"""What the hyper-model settle reads of a tensor, and of a whole run: a few plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from know_cli.engine.movements import Course
from know_cli.kinds import PREDICTED_KINDS, Kind

# Numbers outside these ranges say no more than their ends do.
_GROWTH = 3.0
_SMALLEST, _LARGEST = 1e-6, 10.0
_LARGEST_COUNT = 1e9


def without_order(course: Course) -> Course:
    """The course of branches, which have no order, so that it tells none from another.

    Args:
        course: whose movements are those from Θ0 to each branch.

    Returns:
        The same, with the mean of all squared lengths for each of them, and the mean of the
        products of all pairs for each pair. So :func:`features` has the same cosine at each
        distance, and no growth.
    """
    products, ranks = course.products, range(len(course.products))
    # Exact sums, which are the same in any order.
    square = math.fsum(products[k][k] for k in ranks) / len(ranks)
    pairs = [products[i][j] for i in ranks for j in ranks if i != j]
    product = math.fsum(pairs) / max(len(pairs), 1)
    rows = tuple(tuple(square if i == j else product for j in ranks) for i in ranks)
    return Course(course.count, rows, course.size)


def feature_count(checkpoints: int) -> int:
    """How many numbers :func:`features` gives."""
    return 2 * checkpoints + len(PREDICTED_KINDS) + 1


def features(run: Course, tensor: Course, kind: Kind | None) -> list[float]:
    """What the gate reads, about −1 to 1 each.

    Args:
        run: of all tensors that move, together.
        tensor: of the one that is predicted; for what belongs to no tensor, the run's again.
        kind: of the tensor; None for what belongs to none.

    Returns:
        For the run, then for the tensor: the mean cosine between movements that are 1, 2, …,
        S − 2 apart, the growth of the movements, their length relative to the weights. Then
        which of conv, fc and bias it is, and how many elements it has.
    """
    return [
        *_of_course(run),
        *_of_course(tensor),
        *(float(kind is one) for one in PREDICTED_KINDS),
        math.log10(min(max(tensor.count, 1), _LARGEST_COUNT)) / 6,
    ]


def _of_course(course: Course) -> list[float]:
    products = course.products
    lengths = [math.sqrt(products[k][k]) for k in range(len(products))]
    cosines = [
        _mean(
            _ratio(products[k][k + apart], lengths[k] * lengths[k + apart])
            for k in range(len(products) - apart)
        )
        for apart in range(1, len(products))
    ]
    growth = 0.0
    if lengths[0] > 0 and lengths[-1] > 0:
        growth = min(max(math.log(lengths[-1] / lengths[0]), -_GROWTH), _GROWTH)
    relative = min(max(_ratio(course.length, course.size), _SMALLEST), _LARGEST)
    return [*cosines, growth, math.log10(relative) / 3 + 0.5]


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


def _mean(values: Iterable[float]) -> float:
    found: Sequence[float] = list(values)
    return sum(found) / len(found)
