"""What networks are measured by; of each measure more is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from know_cli.evaluation.tasks.examples import Examples

_ROWS = 500


@dataclass(frozen=True)
class Measure:
    """A figure of merit.

    Attributes:
        name: for tables.
        unit: what it is shown in.
        scale: factor from the value to that unit.
        function: maps a network and examples to the value, and leaves the network in
            evaluation mode.
    """

    name: str
    unit: str
    scale: float
    function: Callable[[nn.Module, Examples], float]

    def to_json(self) -> dict[str, Any]:
        """What tables need of it."""
        return {"name": self.name, "unit": self.unit, "scale": self.scale}


def _outputs(model: nn.Module, examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs ``[m, classes, …]`` and targets ``[m, …]``, some examples at a time."""
    model.eval()
    parts = zip(
        torch.split(examples.inputs, _ROWS), torch.split(examples.targets, _ROWS), strict=True
    )
    with torch.inference_mode():
        for inputs, targets in parts:
            yield model(inputs), targets


def _accuracy(model: nn.Module, examples: Examples) -> float:
    """Share of right answers where one is asked for, 0 to 1."""
    right = asked = 0
    for outputs, targets in _outputs(model, examples):
        right += int((outputs.argmax(1) == targets).sum())
        asked += int((targets >= 0).sum())
    return right / asked


def _mean_iou(model: nn.Module, examples: Examples) -> float:
    """Mean over classes of |answer ∩ truth| / |answer ∪ truth|, over all examples together."""
    counts = torch.zeros(0, 0, dtype=torch.int64)
    for outputs, targets in _outputs(model, examples):
        classes = outputs.shape[1]
        if not len(counts):
            counts = torch.zeros(classes, classes, dtype=torch.int64)
        asked = targets >= 0
        pairs = targets[asked] * classes + outputs.argmax(1)[asked]
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    # A class that neither occurs nor is answered says nothing.
    return float((both[either > 0] / either[either > 0]).mean())


def _log_likelihood(model: nn.Module, examples: Examples) -> float:
    """Mean log-probability of the right answers, in nats: minus the logarithm of perplexity."""
    total, asked = 0.0, 0
    for outputs, targets in _outputs(model, examples):
        total -= float(nn.functional.cross_entropy(outputs, targets, reduction="sum"))
        asked += int((targets >= 0).sum())
    return total / asked


ACCURACY = Measure("accuracy", "points", 100.0, _accuracy)
MEAN_IOU = Measure("mean intersection over union", "points", 100.0, _mean_iou)
TOKEN_ACCURACY = Measure("masked token accuracy", "points", 100.0, _accuracy)
LOG_LIKELIHOOD = Measure("negative log-perplexity", "nats", 1.0, _log_likelihood)
