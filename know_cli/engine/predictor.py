"""What the engine asks of a method: a step for a block of windows, or all for whole tensors.

Methods that run on devices with memory of their own are asked for whole batches instead; see
:class:`~know_cli.engine.lanes.DevicePredictor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.movements import Course
from know_cli.engine.plan import Block, Group, PlannedTensor


class Predictor(Protocol):
    """A method, ready to run on blocks of rows. Must be safe to call from several threads.

    Attributes:
        device: where it computes.
        block_rows: the most rows it takes at a time. A row's result must not depend on the
            other rows of its block.
        thread_bytes: main memory that it needs for itself in each thread that calls it.
    """

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def block_rows(self) -> int:
        """The most rows it takes at a time."""

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that it needs for itself in each thread that calls it."""

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict the values some steps before Θ0; steps come in order, 1 first.

        Args:
            block: of what kind the rows are, and of which tensors.
            step: 1 for θ̂(−1), 2 for θ̂(−2), …
            history: ``[S + step − 1, rows]`` float32 on the CPU: the window, most-forgotten
                first, θ0 at S − 1, then the predictions of the steps before.
            out: ``[rows]`` float32 on the CPU, receives θ̂(−step).
        """


class TensorPredictor(Protocol):
    """The part of a method that does not work row by row: it needs all elements of some tensors."""

    def groups(self, tensors: Sequence[PlannedTensor]) -> list[Group]:
        """Tensors that it needs whole, alone or together; the others go in blocks of rows.

        Args:
            tensors: all that are predicted, in the order of Θ0's files.

        Returns:
            Groups, none of them empty, that have no tensor in common.
        """

    def nbytes(self, group: Group) -> int:
        """Bytes of main memory that one call needs beside ``history`` and ``out``."""

    def predict(self, group: Group, history: Tensor, out: Tensor) -> float | None:
        """Predict all steps of one group.

        Args:
            group: one of those that :meth:`groups` gave.
            history: ``[S, elements]`` float32 on the CPU, most-forgotten first, θ0 last; the
                elements of one tensor after those of the other.
            out: ``[steps, elements]`` float32 on the CPU, receives θ̂(−1), θ̂(−2), …

        Returns:
            The relative error of what does not fit into such tensors; None where all does.
        """


@dataclass(frozen=True)
class Predictors:
    """A method as the engine runs it.

    Attributes:
        rows: predicts in blocks of rows: in threads, or on devices of their own.
        tensors: predicts the tensors that it needs whole; None where a method has no such part.
        exact: predicts the rows of float64 tensors again, from a history in float64 into an
            ``out`` in float64; None where a method cannot, and Θ0 gets the change in float32.
        kernel: which of several implementations computes; others may round differently. None
            where there is only one; on devices what they say themselves.
        reads_movements: whether the tensors of a block are to have their movements, which costs
            one more pass over the inputs.
        coefficients: ``[S]``, Θ0's first, where all that is predicted is an average; None where
            it is not.
        mixture: the shares ``[S]``, Θ0's first, by which running statistics are averaged where
            they follow from how the run went; asks for movements.
        remarks: what else the user should know of the method.
        rows_at_once: the most rows of one call, a multiple of a block's, where more than a block
            cost ``rows`` no more memory; None where it takes a block at a time.
    """

    rows: Predictor | DevicePredictor
    tensors: TensorPredictor | None = None
    exact: Predictor | None = None
    kernel: str | None = None
    reads_movements: bool = False
    coefficients: tuple[float, ...] | None = None
    mixture: Callable[[Course], tuple[float, ...]] | None = None
    remarks: tuple[str, ...] = ()
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rows, DevicePredictor):
            object.__setattr__(self, "kernel", self.rows.kernel)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where rows are computed."""
        return self.rows.devices if isinstance(self.rows, DevicePredictor) else (self.rows.device,)

    @property
    def on_devices(self) -> bool:
        """Whether rows are computed on devices with memory of their own."""
        return isinstance(self.rows, DevicePredictor)

    @property
    def pinned(self) -> bool:
        """Whether batches should be in page-locked memory."""
        return isinstance(self.rows, DevicePredictor) and self.rows.pinned

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the devices and the method."""
        of_devices = self.rows.notices if isinstance(self.rows, DevicePredictor) else ()
        return (*of_devices, *self.remarks)
