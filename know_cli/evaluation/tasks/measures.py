"""The measures of networks; for each of them, more is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from know_cli.evaluation.tasks.examples import Examples

_ROWS = 500
# Of a batch's inputs; what networks make of them takes a hundred times as much.
_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Measure:
    """A score of networks.

    Attributes:
        name: for tables.
        unit: in which tables show it.
        scale: factor from the value to that unit.
        function: maps a network and examples to the value, and leaves the network in
            evaluation mode.
    """

    name: str
    unit: str
    scale: float
    function: Callable[[nn.Module, Examples], float]

    def to_json(self) -> dict[str, Any]:
        """What tables need, in plain types."""
        return {"name": self.name, "unit": self.unit, "scale": self.scale}


def _outputs(model: nn.Module, examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs ``[m, classes, …]`` and targets ``[m, …]``, batch by batch."""
    model.eval()
    rows = max(1, min(_ROWS, _NUMBERS // max(examples.inputs[:1].numel(), 1)))
    parts = zip(
        torch.split(examples.inputs, rows), torch.split(examples.targets, rows), strict=True
    )
    with torch.inference_mode():
        for inputs, targets in parts:
            yield model(inputs), targets


def _accuracy(model: nn.Module, examples: Examples) -> float:
    """Share of correct answers at the positions that count, 0 to 1."""
    right = asked = 0
    for outputs, targets in _outputs(model, examples):
        right += int((outputs.argmax(1) == targets).sum())
        asked += int((targets >= 0).sum())
    return right / asked


def _mean_iou(model: nn.Module, examples: Examples) -> float:
    """Mean over classes of |answer ∩ truth| / |answer ∪ truth|, pooled over all examples."""
    counts = torch.zeros(0, 0, dtype=torch.int64)
    for outputs, targets in _outputs(model, examples):
        classes = outputs.shape[1]
        if not len(counts):
            counts = torch.zeros(classes, classes, dtype=torch.int64)
        asked = targets >= 0
        pairs = targets[asked] * classes + outputs.argmax(1)[asked]
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
    both = counts.diagonal()
    either = counts.sum(0) + counts.sum(1) - both
    # A class that occurs neither in the targets nor in the answers does not count.
    return float((both[either > 0] / either[either > 0]).mean())


def _log_likelihood(model: nn.Module, examples: Examples) -> float:
    """Mean log-probability of the correct answers, in nats: minus the log of perplexity."""
    total, asked = 0.0, 0
    for outputs, targets in _outputs(model, examples):
        total -= float(nn.functional.cross_entropy(outputs, targets, reduction="sum"))
        asked += int((targets >= 0).sum())
    return total / asked


ACCURACY = Measure("accuracy", "points", 100.0, _accuracy)
MEAN_IOU = Measure("mean intersection over union", "points", 100.0, _mean_iou)
TOKEN_ACCURACY = Measure("masked token accuracy", "points", 100.0, _accuracy)
LOG_LIKELIHOOD = Measure("negative log-perplexity", "nats", 1.0, _log_likelihood)
