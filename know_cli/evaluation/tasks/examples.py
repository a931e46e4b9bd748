"""Examples of a task: inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with targets.

    Attributes:
        inputs: ``[n, …]`` as the task's networks take them.
        targets: int64 ``[n]`` or ``[n, …]``, the right class at each position of the networks'
            outputs ``[n, classes, …]``; −100 at positions that do not count.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Examples:
        """The same examples on a device."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    def take(self, indices: Tensor) -> Examples:
        """The examples with these int64 indices ``[m]``."""
        return Examples(self.inputs[indices], self.targets[indices])
