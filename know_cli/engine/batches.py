"""Runs of a batch's rows that are cast, written and summed up together, tiny tensors among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from know_cli.checkpoints import Sink
from know_cli.checkpoints.checkpoint import TensorEntry
from know_cli.checkpoints.dtypes import BITS
from know_cli.checkpoints.reading import as_bytes, chunks
from know_cli.engine.plan import Batch, Segment
from know_cli.kinds import Kind
from know_cli.passes.numbers import all_finite


@dataclass
class Buffer:
    """A batch in memory.

    Attributes:
        history: ``[S + steps, rows]`` float32: the window, most-forgotten first, then the steps.
        copied: ``[rows]`` bool, where an input is not finite and Θ0's value is taken.
        replaced: ``[steps, rows]`` bool, where a prediction is not finite and Θ0's value is.
        halves: ``[S + steps, rows]``, the same in 16 bits, as devices get and give what is stored
            so; None where there are no devices.
        stored: the type of 16 bits that all of the window is stored in; None where it is not.
        is_marked: whether any row may be marked as either, which is rare.
    """

    history: Tensor
    copied: Tensor
    replaced: Tensor
    halves: Tensor | None = None
    stored: torch.dtype | None = None
    is_marked: bool = False

    @staticmethod
    def new(
        checkpoints: int, steps: int, rows: int, *, on_devices: bool = False, pinned: bool = False
    ) -> Buffer:
        """Room for batches of up to ``rows`` rows; ``pinned`` is page-locked, for devices."""
        halves = None
        if on_devices:
            halves = torch.empty(checkpoints + steps, rows, dtype=torch.float16, pin_memory=pinned)
        return Buffer(
            torch.empty(checkpoints + steps, rows, pin_memory=pinned),
            torch.zeros(rows, dtype=torch.bool),
            torch.zeros(steps, rows, dtype=torch.bool),
            halves,
        )

    def as_stored(self) -> Tensor | None:
        """``[S + steps, rows]`` of 16 bits, where the whole window is there in its own type."""
        if self.halves is None or self.stored is None or self.is_marked:
            return None
        return self.halves.view(self.stored)

    def clear(self) -> None:
        """Take away all that was noted of a batch, for another."""
        self.stored = None
        if self.is_marked:
            self.copied.zero_()
            self.replaced.zero_()
            self.is_marked = False

    def keep_finite(self, checkpoints: int, step: int, rows: slice) -> None:
        """Replace a step's predictions that are not finite by θ0; steps count from 0.

        NaN would spread through the later steps, so these go on from θ0; the rows are marked,
        and counted when they are written.
        """
        out = self.history[checkpoints + step, rows]
        if not all_finite(out):
            finite = torch.isfinite(out)
            out.copy_(torch.where(finite, out, self.history[checkpoints - 1, rows]))
            self.replaced[step, rows] = ~finite
            self.is_marked = True


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a batch that lie together in a file of one checkpoint, and are read at once.

    Attributes:
        entry: the tensor that they begin in; they may go on in those after it.
        start: position of the first within that tensor.
        rows: in the batch.
    """

    entry: TensorEntry
    start: int
    rows: slice


def adjacent(segments: Sequence[Segment], entries: Sequence[TensorEntry]) -> Iterator[Run]:
    """Cut a batch where one checkpoint has something else between two tensors, or another type.

    Tiny tensors, of which there are thousands, are mostly stored one after the other.

    Args:
        segments: of a batch.
        entries: of each its tensor in the checkpoint.
    """
    begin = 0
    for number in range(1, len(segments) + 1):
        if number < len(segments):
            last, entry = segments[number - 1], entries[number]
            before, size = entries[number - 1], BITS[entry.info.dtype] // 8
            if (
                entry.info.begin + segments[number].start * size
                == before.info.begin + (last.start + last.count) * size
                and entry.info.dtype == before.info.dtype
                and entry.path == before.path
            ):
                continue
        first, last = segments[begin], segments[number - 1]
        yield Run(entries[begin], first.start, slice(first.row, last.row + last.count))
        begin = number


@dataclass(frozen=True)
class Stretch:
    """Rows of a batch that are cast, written and summed up together: of one kind and one dtype.

    Of tiny tensors there are thousands in one, which then cost hardly more than their bytes.

    Attributes:
        kind: of its tensors.
        dtype: of its tensors, by its safetensors name.
        rows: its rows in the batch.
        segments: its tensors, by rows of the stretch.
    """

    kind: Kind
    dtype: str
    rows: slice
    segments: tuple[Segment, ...]

    @property
    def count(self) -> int:
        """How many elements."""
        return int(self.rows.stop - self.rows.start)


def cut_stretches(batch: Batch, block_rows: int, most: int) -> Iterator[Stretch]:
    """Cut a batch wherever the dtype or the kind changes, and where a stretch is long enough.

    Args:
        batch: which begins where a block does.
        block_rows: of a block. Stretches end with a block, or, of blocks that are longer, at the
            same places of each, so that it does not matter in which batch a block is.
        most: rows of a stretch.
    """
    unit = block_rows * max(1, most // block_rows)
    segments: list[Segment] = []
    begin = 0
    for whole in batch.segments:
        for row, count in _chunks(whole.row, whole.count, unit, most):
            if segments and (
                row % unit % most == 0
                or whole.tensor.dtype != segments[0].tensor.dtype
                or whole.tensor.kind is not segments[0].tensor.kind
            ):
                yield _stretch(begin, segments)
                begin, segments = row, []
            start = whole.start + row - whole.row
            segments.append(Segment(whole.tensor, start, count, row - begin))
    if segments:
        yield _stretch(begin, segments)


def _chunks(start: int, count: int, unit: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range at the multiples of a unit, and at those of a smaller one within each."""
    for begin, length in chunks(start, count, unit):
        offset = begin % unit
        for first, size in chunks(offset, length, most):
            yield begin - offset + first, size


def _stretch(begin: int, segments: list[Segment]) -> Stretch:
    rows, tensor = slice(begin, begin + segments[-1].rows.stop), segments[0].tensor
    return Stretch(tensor.kind, tensor.dtype, rows, tuple(segments))


def write_stretch(sink: Sink, stretch: Stretch, values: Tensor) -> None:
    """Write each tensor's part of a stretch to its place.

    Args:
        sink: one output.
        stretch: whose values these are.
        values: ``[rows]``, in the stretch's dtype.

    Raises:
        OutputError: the output cannot be written.
    """
    data, size = as_bytes(values), values.element_size()
    for segment in stretch.segments:
        part = data[segment.row * size : (segment.row + segment.count) * size]
        sink.write(segment.tensor.name, segment.start * size, part)
