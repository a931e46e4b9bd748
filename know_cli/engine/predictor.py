"""What the engine asks of a method: one step for a block of windows."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from know_cli.kinds import Kind


class Predictor(Protocol):
    """A method, ready to run. Must be safe to call from several threads.

    Attributes:
        block_rows: the most rows it takes at a time. A row's result must not depend on the
            other rows of its block.
        thread_bytes: main memory that it needs for itself in each thread that calls it.
    """

    @property
    def block_rows(self) -> int:
        """The most rows it takes at a time."""

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that it needs for itself in each thread that calls it."""

    def predict(self, kind: Kind, history: Tensor, out: Tensor) -> None:
        """Predict the value one step before each window.

        Args:
            kind: conv, fc or bias.
            history: ``[S, rows]`` float32 on the CPU, most-forgotten first, θ0 last.
            out: ``[rows]`` float32 on the CPU, receives θ̂(−1).
        """
