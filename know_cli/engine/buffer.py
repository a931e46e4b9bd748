"""A batch of windows and predictions in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Buffer:
    """A batch in memory.

    Attributes:
        history: ``[S + steps, rows]`` float32: the window, most-forgotten first, then the steps.
        copied: ``[rows]`` bool, where an input is not finite and Θ0's value is taken.
        replaced: ``[steps, rows]`` bool, where a prediction is not finite and Θ0's value is.
    """

    history: Tensor
    copied: Tensor
    replaced: Tensor

    @staticmethod
    def new(checkpoints: int, steps: int, rows: int, pinned: bool = False) -> Buffer:
        """Room for batches of up to ``rows`` rows; ``pinned`` is page-locked, for devices."""
        return Buffer(
            torch.empty(checkpoints + steps, rows, pin_memory=pinned),
            torch.zeros(rows, dtype=torch.bool),
            torch.zeros(steps, rows, dtype=torch.bool),
        )

    def keep_finite(self, checkpoints: int, step: int, rows: slice) -> None:
        """Put θ0 where a step's predictions, the first being 0, are not finite.

        NaN would spread through the later steps, so these go on from θ0; the rows are marked,
        and counted when they are written.
        """
        out = self.history[checkpoints + step, rows]
        finite = torch.isfinite(out)
        if not finite.all():
            out.copy_(torch.where(finite, out, self.history[checkpoints - 1, rows]))
            self.replaced[step, rows] = ~finite
