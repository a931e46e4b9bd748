"""Averages of a run's checkpoints, by the decay of the learning rate that they stand for.

The checkpoint after n updates is the first one plus the sum of the updates, so a sum of
checkpoints with coefficients that add up to 1 is the first one plus updates that count less the
later they are: what a decay of the rate would have done to them, had the gradients stayed the
same (arXiv 2507.17634). If the updates between checkpoints j − 1 and j count d_j, with d_0 = 1 and
d_S = 0, then checkpoint j has the coefficient c_j = d_j − d_(j + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from know_cli.evaluation.tasks import Examples
from know_cli.methods.decay import exponential_coefficients

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


#: Measured at every spacing only where bundles are compared with it: the most careful one.
SPACED = Average(5, "ema")


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
        return exponential_coefficients(count)
    decay = _DECAYS[average.shape]
    kept = [1.0, *(decay((j - 0.5) / (count - 1)) for j in range(1, count)), 0.0]
    return [kept[j] - kept[j + 1] for j in range(count)]


def re_estimate(model: nn.Module, examples: Examples) -> None:
    """Set a network's running statistics to those of examples, and leave it in evaluation mode."""
    from torch.optim.swa_utils import update_bn

    count = min(len(examples), RE_ESTIMATED_ON)
    # Batches of equal size: layers that normalise over the batch need several examples.
    whole = count // _BATCH * _BATCH or count
    with torch.random.fork_rng(devices=[]):
        update_bn(torch.split(examples.inputs[:whole], _BATCH), model)
    model.eval()
