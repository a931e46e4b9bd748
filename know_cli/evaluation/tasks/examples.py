"""Examples of a task: inputs and what is to be predicted of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with what is to be answered.

    Attributes:
        inputs: ``[n, …]`` as the task's networks take them.
        targets: int64 ``[n]`` or ``[n, …]``, the right class of each position of the networks'
            outputs ``[n, classes, …]``; −100 where none is asked for.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Examples:
        """The examples with these int64 indices ``[m]``."""
        return Examples(self.inputs[indices], self.targets[indices])
