"""Averages of a run's checkpoints, by the decay of the learning rate that they stand for.

The checkpoint after n updates is the first one plus the sum of the updates, so a sum of
checkpoints with coefficients that add up to 1 is the first one plus updates that count less the
later they are: what a decay of the rate would have done to them, had the gradients stayed the
same (arXiv 2507.17634). If the updates between checkpoints j − 1 and j count d_j, with d_0 = 1 and
d_S = 0, then checkpoint j has the coefficient c_j = d_j − d_(j + 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from know_cli.evaluation.tasks import Examples

_MEAN, _VARIANCE = "running_mean", "running_var"
_BATCH = 64
#: Examples that running statistics are re-estimated on, at most.
RE_ESTIMATED_ON = 512

# What the updates at a share x of the decay count; the mean of S checkpoints is what counts
# (S − j)/S, so it needs no shape.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class Average:
    """A way of averaging.

    Attributes:
        count: number of checkpoints, from the last one backwards.
        shape: ``uniform``, ``ema`` or a decay: ``linear``, ``sqrt``, ``cosine``.
    """

    count: int
    shape: str = "uniform"

    @property
    def name(self) -> str:
        """For tables, such as ``average-5`` or ``average-5-sqrt``."""
        return f"average-{self.count}" + ("" if self.shape == "uniform" else f"-{self.shape}")


#: The averages of the main comparison.
AVERAGES = (
    Average(2),
    Average(3),
    Average(5),
    Average(5, "linear"),
    Average(5, "sqrt"),
    Average(5, "cosine"),
    Average(5, "ema"),
)


def coefficients(average: Average) -> list[float]:
    """The coefficient of each checkpoint, the oldest first; they add up to 1.

    A decay's value is taken in the middle between two checkpoints. An exponential average forgets
    half in half of the window.

    >>> coefficients(Average(3, "linear"))
    [0.25, 0.5, 0.25]
    """
    count = average.count
    if average.shape == "uniform":
        return [1 / count] * count
    if average.shape == "ema":
        weights = [0.5 ** (2 * (count - 1 - j) / (count - 1)) for j in range(count)]
        return [weight / sum(weights) for weight in weights]
    decay = _DECAYS[average.shape]
    kept = [1.0, *(decay((j - 0.5) / (count - 1)) for j in range(1, count)), 0.0]
    return [kept[j] - kept[j + 1] for j in range(count)]


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


def re_estimate(model: nn.Module, examples: Examples) -> None:
    """Set a network's running statistics to those of examples, and leave it in evaluation mode."""
    from torch.optim.swa_utils import update_bn

    count = min(len(examples), RE_ESTIMATED_ON)
    # Batches of equal size: layers that normalise over the batch need several examples.
    whole = count // _BATCH * _BATCH or count
    with torch.random.fork_rng(devices=[]):
        update_bn(torch.split(examples.inputs[:whole], _BATCH), model)
    model.eval()
