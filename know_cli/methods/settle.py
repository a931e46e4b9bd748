"""The hyper-model settle: an average whose coefficients follow from how the checkpoints went.

Each tensor has its own coefficients, which sum to 1; they depend on how it and the whole run moved
from checkpoint to checkpoint (:mod:`know_cli.settle.course`), and of a bundle that reads roles on
the tensor's role (:mod:`know_cli.settle.role`). A bundle with a width adds a correction to each
element. Like an average, all steps are the same.

Of branches it makes the same whatever their order, but for rounding. A tensor that not all branches
have in Θ0's shape, such as a head, is the mean of those that have it, as with the method
``average``: what a bundle has learned is of tensors that all of them train.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from know_cli.engine.movements import Course
from know_cli.engine.plan import Block, PlannedTensor
from know_cli.engine.predictor import Predictors
from know_cli.methods.branches import mean_of_branches
from know_cli.methods.inputs import Inputs
from know_cli.passes.numbers import round_to_odd
from know_cli.settle.bundle import SettleBundle
from know_cli.settle.module import shares
from know_cli.settle.role import role_of

_BLOCK_ROWS = 1 << 14
_HALVES = ("F16", "BF16")


class SettlePredictor:
    """Predicts with a bundle.

    Args:
        bundle: the weights.
        absent: tensor → positions of the branches that do not have it, Θ0 being 0.
    """

    device = torch.device("cpu")
    block_rows = _BLOCK_ROWS

    def __init__(
        self, bundle: SettleBundle, absent: Mapping[str, frozenset[int]] | None = None
    ) -> None:
        self._model = bundle.module()
        # In float64, so that coefficients sum to 1, and what does not move stays.
        self._exact = bundle.module().double()
        self._size, self._width = bundle.checkpoints, bundle.width
        self._gates: dict[str, tuple[list[float], Tensor]] = {}
        self._absent = absent or {}
        self._lock = threading.Lock()

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that it needs in each thread: sums, and what corrections take."""
        widths = 4 * (self._size + 2) + 6 * self._width if self._width else 0
        if self._width and self._exact.branches:
            widths += 4 * self._size  # sorted, with positions in int64
        return (2 * 8 + 4 * widths) * _BLOCK_ROWS

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        window = history[: self._size]
        total = torch.zeros(out.shape, dtype=torch.float64)
        segments = list(block.segments())
        for segment in segments:
            part = total[segment.rows]
            for coefficient, values in zip(
                self._gates_of(segment.tensor)[0], window[:, segment.rows], strict=True
            ):
                # The product is rounded before it is added, wherever a row is in its block.
                part.add_(values.to(torch.float64, copy=True).mul_(coefficient))
        if self._width:
            rows = out.shape[0]
            # Always as many rows, so that a row's correction does not depend on the others.
            padded = torch.zeros(self._size, _BLOCK_ROWS)
            padded[:, :rows] = window
            condition = torch.zeros(_BLOCK_ROWS, self._width)
            length, size = torch.zeros(_BLOCK_ROWS), torch.zeros(_BLOCK_ROWS)
            for segment in segments:
                movements = segment.tensor.movements
                if movements is not None:
                    condition[segment.rows] = self._gates_of(segment.tensor)[1]
                    length[segment.rows] = movements.course.length
                    size[segment.rows] = movements.course.size
            total += self._model.correction(padded, condition, length, size)[:rows]
        for dtype, span in block.dtypes():
            if dtype in _HALVES:
                round_to_odd(total[span])
        out.copy_(total)

    def _gates_of(self, tensor: PlannedTensor) -> tuple[list[float], Tensor]:
        """Coefficients of a tensor's window, oldest first, and its condition."""
        with self._lock:
            found = self._gates.get(tensor.name)
            if found is None:
                found = self._measured_gates(tensor)
                self._gates[tensor.name] = found
            return found

    def _measured_gates(self, tensor: PlannedTensor) -> tuple[list[float], Tensor]:
        movements = tensor.movements
        if movements is None:  # not all branches have it, or it does not move
            absent = self._absent.get(tensor.name, frozenset(range(1, self._size)))
            return list(mean_of_branches(self._size, absent)[::-1]), torch.zeros(self._width)
        role = role_of(tensor.name, tensor.shape, tensor.reason)
        row = self._exact.features(movements.run, movements.course, tensor.kind, role)
        coefficients, conditions = self._exact.gates(torch.tensor([row], dtype=torch.float64))
        return coefficients[0].tolist(), conditions[0].float()

    def mixture(self, run: Course) -> tuple[float, ...]:
        """The shares by which running statistics are averaged, Θ0's first."""
        row = torch.tensor([self._exact.features(run, run, None, None)], dtype=torch.float64)
        return tuple(shares(self._exact.gates(row)[0][0]).flip(0).tolist())


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        CheckpointError: the bundle is for another number of checkpoints.
    """
    rows = SettlePredictor(inputs.bundle_of(SettleBundle), inputs.trajectory.absent)
    return Predictors(rows, exact=rows, reads_movements=True, mixture=rows.mixture)
