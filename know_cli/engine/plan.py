"""What happens to each tensor, and in which batches the parameters go through the predictor.

The parameters of one kind, tensor after tensor in the order of Θ0's files, are one long stream
of rows. Blocks are cut from it at fixed positions and batches are whole numbers of blocks, so
the numbers that come out do not depend on the memory budget or the number of threads. Tensors
that a method needs whole come after them, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from know_cli.kinds import (
    PREDICTED_KINDS,
    Kind,
)
from know_cli.normalisation import NormLayer


class Action(str, Enum):
    """What happens to one tensor."""

    PREDICT = "predict"
    COPY = "copy"
    RESCALE = "rescale"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor, and what happens to it.

    Attributes:
        name: in the state dict.
        kind: the KNOWN that predicts it; for other actions the kind that it is.
        action: what happens.
        reason: why, in words for the user.
        dtype: safetensors name in Θ0, and so in the output.
        shape: its shape.
        elements: number of parameters.
        nbytes: size in Θ0.
        layer: the normalisation layer that it belongs to.
        whole: whether it is predicted from all its elements together.
    """

    name: str
    kind: Kind
    action: Action
    reason: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int
    layer: NormLayer | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one tensor's elements inside a batch: ``[start, start + count)`` at ``row``."""

    tensor: PlannedTensor
    start: int
    count: int
    row: int


@dataclass(frozen=True)
class Batch:
    """Rows of one kind that are read, predicted and written together."""

    kind: Kind
    segments: tuple[Segment, ...]
    rows: int


@dataclass(frozen=True)
class Copy:
    """A run of one tensor's bytes that is copied: ``[start, start + nbytes)``."""

    tensor: PlannedTensor
    start: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before a byte of it has.

    Attributes:
        tensors: every tensor of the output, in the order of Θ0's files.
        batch_rows: rows of a full batch.
        memory: bytes of working memory that the batches, or the largest tensor that is needed
            whole, and the predictor need.
        bytes_to_read: of tensor data, from all checkpoints, without the scan for frozen tensors.
        bytes_to_write: of all outputs together.
    """

    tensors: tuple[PlannedTensor, ...]
    batch_rows: int
    memory: int
    bytes_to_read: int
    bytes_to_write: int

    def with_action(self, action: Action) -> list[PlannedTensor]:
        """The tensors that something happens to."""
        return [tensor for tensor in self.tensors if tensor.action is action]

    @property
    def predicted(self) -> int:
        """Parameters that are predicted."""
        return sum(tensor.elements for tensor in self.with_action(Action.PREDICT))

    def batches(self) -> Iterator[Batch]:
        """The batches of parameters that are predicted row by row, kind after kind."""
        for kind in PREDICTED_KINDS:
            yield from cut_batches(kind, self.stream(kind), self.batch_rows)

    def stream(self, kind: Kind) -> list[PlannedTensor]:
        """The tensors of a kind that are predicted row by row, one after the other."""
        return [t for t in self.with_action(Action.PREDICT) if t.kind is kind and not t.whole]

    def whole_tensors(self) -> Iterator[Batch]:
        """Each tensor that is predicted from all its elements together, as a batch of its own."""
        for tensor in self.with_action(Action.PREDICT):
            if tensor.whole:
                segment = Segment(tensor, 0, tensor.elements, 0)
                yield Batch(tensor.kind, (segment,), tensor.elements)

    def copies(self) -> Iterator[Copy]:
        """What is copied byte by byte."""
        for tensor in self.with_action(Action.COPY):
            yield Copy(tensor, 0, tensor.nbytes)


def cut_batches(
    kind: Kind, tensors: Sequence[PlannedTensor], batch_rows: int, rows: range | None = None
) -> Iterator[Batch]:
    """Fill batches of ``batch_rows`` rows with tensors, small ones together, large ones cut.

    Args:
        kind: of the tensors.
        tensors: of which one after the other the stream of rows is made.
        batch_rows: of all batches but the last.
        rows: of the stream; None is all.
    """
    segments: list[Segment] = []
    row = position = 0
    for tensor in tensors:
        start, stop = 0, tensor.elements
        if rows is not None:
            start, stop = max(rows.start - position, 0), min(rows.stop - position, stop)
        position += tensor.elements
        while start < stop:
            count = min(stop - start, batch_rows - row)
            segments.append(Segment(tensor, start, count, row))
            start, row = start + count, row + count
            if row == batch_rows:
                yield Batch(kind, tuple(segments), row)
                segments, row = [], 0
    if segments:
        yield Batch(kind, tuple(segments), row)
