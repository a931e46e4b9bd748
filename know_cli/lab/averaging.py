"""Averages of the states of small networks, and how a run went from one to the next."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_MEAN, _VARIANCE = "running_mean", "running_var"


def combine(
    states: Sequence[Mapping[str, Tensor]], numbers: Sequence[float], spread: bool = True
) -> dict[str, Tensor]:
    """The average of checkpoints.

    Sums are in float64 and rounded once. Integers are the last checkpoint's. A running variance is
    the mean of the variances plus the variance of the running means: that of the mixture of what
    the checkpoints have seen.

    Args:
        states: the oldest first.
        numbers: the coefficient of each.
        spread: whether the variance of the running means is added.
    """
    averaged = {}
    for name, last in states[-1].items():
        if not last.is_floating_point():
            averaged[name] = last.clone()
            continue
        total = _sum([state[name] for state in states], numbers)
        stem, _, leaf = name.rpartition(_VARIANCE)
        if spread and name.endswith(_VARIANCE) and not leaf:
            means = [state[stem + _MEAN].double() for state in states]
            centre = _sum(means, numbers)
            total += _sum([(mean - centre).square() for mean in means], numbers)
        averaged[name] = total.to(last.dtype)
    return averaged


def _sum(tensors: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, number in zip(tensors, numbers, strict=True):
        total += number * tensor.double()
    return total


def shape_of(states: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """How a run went from checkpoint to checkpoint, over all floating-point weights together.

    Args:
        states: at least three, the oldest first.

    Returns:
        ``parallel``, the mean cosine of the angle between successive steps: 1 for a straight
        line, about 0 for steps of their own, below 0 for steps back and forth; ``kept``, the norm
        of the mean of the checkpoints as a share of the mean of their norms.
    """
    names = [
        name
        for name, tensor in states[0].items()
        if tensor.is_floating_point() and not name.endswith((_MEAN, _VARIANCE))
    ]
    points = [torch.cat([state[name].double().flatten() for name in names]) for state in states]
    steps = [after - before for before, after in itertools.pairwise(points)]
    cosines = [
        float(first @ second / (first.norm() * second.norm()).clamp(min=1e-300))
        for first, second in itertools.pairwise(steps)
    ]
    norms = [float(point.norm()) for point in points]
    mean = float(torch.stack(points).mean(0).norm())
    return {
        "parallel": round(sum(cosines) / len(cosines), 5),
        "kept": round(mean * len(norms) / sum(norms), 5),
    }


def has_running_statistics(state: Mapping[str, Tensor]) -> bool:
    """Whether a network's normalisation layers keep statistics of what they have seen."""
    return any(name.endswith(_VARIANCE) for name in state)
