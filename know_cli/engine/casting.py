"""From predictions in float32 to the numbers that are written, in each tensor's own dtype.

All methods, kernels and devices share this: what is the same in all checkpoints keeps Θ0's bits,
float64 keeps the digits that float32 does not have, and a prediction that is not finite is refused
with the name of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints.dtypes import FLOATS, torch_dtype
from know_cli.checkpoints.reading import read_elements, read_float32
from know_cli.engine.batches import Buffer, Stretch
from know_cli.engine.job import Job
from know_cli.engine.plan import Batch, Segment
from know_cli.engine.settings import FrozenMode
from know_cli.errors import CheckpointError
from know_cli.passes.numbers import Mask, cast_finite, same_bits

_DOUBLE = "F64"


class Casting:
    """One stretch of a predicted batch on its way to its own dtype, step by step.

    Args:
        job: that is executed.
        batch: that the stretch is of.
        stretch: which rows.
        buffer: the batch in memory, with all steps predicted.

    Attributes:
        before: ``[rows]``, Θ0's values: float64 if the stretch is, else float32; without meaning
            in rows that are copied.
        frozen: how many elements are the same in all checkpoints and keep Θ0's bits.

    Raises:
        CheckpointError: a prediction is not finite, and ``allow_nonfinite`` does not allow that.
    """

    def __init__(self, job: Job, batch: Batch, stretch: Stretch, buffer: Buffer) -> None:
        size, rows = len(job.trajectory), stretch.rows
        self._job, self._batch, self._stretch = job, batch, stretch
        self._newest, self._steps = buffer.history[size - 1, rows], buffer.history[size:, rows]
        self._copied: Mask = buffer.copied[rows].numpy()
        self._replaced: Mask = buffer.replaced[:, rows].numpy()
        self.before, self._window = self._newest, None
        if stretch.dtype == _DOUBLE:
            if job.predictors.exact is not None and not stretch.segments[0].tensor.whole:
                self._window = _read_doubles(job, stretch.segments, size)
                self.before = self._window[-1]
            else:
                self.before = read_before(job, stretch)
        self._frozen = None
        # Tensors that are predicted together, as factors of one product, only fit each other whole.
        is_joint = len(batch.segments) > 1 and batch.segments[0].tensor.whole
        if job.settings.frozen is FrozenMode.COPY and not is_joint and size > 1:
            self._frozen = self._unmoved(buffer.history[:size, rows])
        self.frozen = 0 if self._frozen is None else int(np.count_nonzero(self._frozen))
        self._is_marked = False
        if buffer.is_marked:
            if self._frozen is not None:
                self._replaced = self._replaced & ~self._frozen
            self._is_marked = bool(self._copied.any() or self._replaced.any())
        # Whether or not a step is written, those after it go on from it.
        if self._is_marked and not job.settings.allow_nonfinite and self._replaced.any():
            step = int(np.flatnonzero(self._replaced.any(axis=1))[0])
            self._refuse(self._replaced[step], step + 1, "float32")

    def after(self, step: int) -> tuple[Tensor, Mask | None]:
        """What is written after a step, with Θ0's own values where there is no finite prediction.

        Returns:
            ``[rows]`` in the stretch's dtype, and where predictions were replaced; None if
            nothing was.

        Raises:
            CheckpointError: a prediction is not finite in that dtype, and ``allow_nonfinite`` does
                not allow that.
        """
        values = self._steps[step - 1]
        if not self._is_marked:
            if self._stretch.dtype == "F32" and self._frozen is None:
                return values, None
            cast = cast_finite(values, self.before, self._frozen, self._stretch.dtype)
            if cast is not None:
                return cast, None
        if self._stretch.dtype == _DOUBLE:
            values = self._in_float64(step, values)
        if self._frozen is not None:
            values = torch.where(torch.from_numpy(self._frozen), self.before, values)
        cast = values.to(torch_dtype(self._stretch.dtype))
        replaced = self._replaced[step - 1]
        if _may_overflow(values, cast.dtype):
            replaced = replaced | ~torch.isfinite(cast).numpy()
        replaced = replaced & ~self._copied
        taken = replaced | self._copied
        if not taken.any():
            return cast, None
        if replaced.any() and not self._job.settings.allow_nonfinite:
            self._refuse(replaced, step, FLOATS[self._stretch.dtype])
        return torch.where(torch.from_numpy(taken), self._original(), cast), replaced

    def _in_float64(self, step: int, predicted: Tensor) -> Tensor:
        """Float64 values, whose digits a prediction in float32 cannot hold.

        A method that can is asked again, in float64. Otherwise the change that was predicted is
        added to Θ0; where there is none, Θ0 keeps its bits, the sign of a zero, too.
        """
        exact = self._job.predictors.exact
        if exact is None or self._window is None:
            change = predicted.double() - self._newest.double()
            return torch.where(predicted == self._newest, self.before, self.before + change)
        out = torch.empty_like(self.before)
        first, count = self._stretch.rows.start, self._stretch.count
        for begin in range(0, count, exact.block_rows):
            end = min(begin + exact.block_rows, count)
            block = self._batch.block(slice(first + begin, first + end))
            exact.predict(block, step, self._window[:, begin:end], out[begin:end])
        return out

    def _unmoved(self, window: Tensor) -> Mask | None:
        """Where the value is the same in all checkpoints, bit for bit; None for nowhere.

        Args:
            window: ``[S, rows]`` float32; 0 in rows that are copied.
        """
        same = same_bits(window)
        if same is None:
            return None
        same &= ~self._copied
        # Every other float type fits into float32; float64 values that differ may be one there.
        if self._window is not None:
            equal = same_bits(self._window)
            return None if equal is None else equal & same
        doubles = self._job.plan.doubles
        for segment in self._stretch.segments if doubles else ():
            its = same[segment.rows]
            if segment.tensor.name in doubles and its.any():
                alone = replace(segment, row=0)
                equal = same_bits(_read_doubles(self._job, (alone,), len(window)))
                its &= False if equal is None else equal
        return same if same.any() else None

    def _original(self) -> Tensor:
        """Θ0's own values, ``[rows]`` in its dtype."""
        if self._stretch.dtype == _DOUBLE:
            return self.before
        first = self._job.trajectory.first
        original = torch.empty(self._stretch.count, dtype=torch_dtype(self._stretch.dtype))
        for segment in self._stretch.segments:
            entry = first.tensors[segment.tensor.name]
            original[segment.rows] = read_elements(first, entry, segment.start, segment.count)
        return original

    def _refuse(self, replaced: Mask, step: int, dtype: str) -> NoReturn:
        row = int(np.flatnonzero(replaced)[0])
        segment = next(s for s in self._stretch.segments if row < s.row + s.count)
        tensor = segment.tensor
        index = np.unravel_index(segment.start + row - segment.row, tensor.shape)
        place = f"element {[int(i) for i in index]}" if tensor.shape else "its value"
        raise CheckpointError(
            f"{self._job.trajectory.first.tensors[tensor.name].path}: tensor {tensor.name!r}: the "
            f"prediction of {place} after step {step} is not finite in {dtype}; "
            "--allow-nonfinite copies such values from the first checkpoint"
        )


def read_before(job: Job, stretch: Stretch) -> Tensor:
    """Θ0's values of a stretch, ``[rows]``: float64 if the stretch is, else float32.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if stretch.dtype == _DOUBLE:
        return _read_doubles(job, stretch.segments, 1)[0]
    before, first = torch.empty(stretch.count), job.trajectory.first
    for segment in stretch.segments:
        entry = first.tensors[segment.tensor.name]
        read_float32(first, entry, segment.start, before[segment.rows])
    return before


def _read_doubles(job: Job, segments: Sequence[Segment], count: int) -> Tensor:
    """Segments in the first checkpoints, ``[count, rows]`` float64, in the order of a window."""
    window = torch.empty(count, segments[-1].rows.stop, dtype=torch.float64)
    for k in range(count):
        checkpoint, values = job.trajectory.checkpoints[k], window[count - 1 - k]
        for segment in segments:
            entry = job.trajectory.entries(segment.tensor.name)[k]
            values[segment.rows] = read_elements(checkpoint, entry, segment.start, segment.count)
            if job.drops_cached:
                size = torch_dtype(entry.dtype).itemsize
                checkpoint.drop_cached(entry, segment.start * size, segment.count * size)
    return window


def _may_overflow(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values, ``[rows]``, may not be finite in another dtype."""
    if dtype == values.dtype or not len(values):
        return False
    low, high = torch.aminmax(values)
    return max(-float(low), float(high)) > torch.finfo(dtype).max
