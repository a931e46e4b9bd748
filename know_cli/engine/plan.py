"""What happens to each tensor, and to which rows and bytes of it: data only.

The parameters of one kind, tensor after tensor in the order of Θ0's files, are one long stream
of rows. Blocks are cut from it at fixed positions and batches are whole numbers of blocks, so
the numbers that come out do not depend on the memory budget or the number of threads. Tensors
that a method needs whole come after them, one group at a time.

:mod:`know_cli.engine.planning` makes plans; :mod:`know_cli.engine.parts` cuts parts from them,
which are plans again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate

from know_cli.engine.movements import Movements
from know_cli.kinds import Kind
from know_cli.normalisation import NormLayer


class Action(str, Enum):
    """What happens to one tensor."""

    PREDICT = "predict"
    COPY = "copy"
    RESCALE = "rescale"
    AVERAGE = "average"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor, and what happens to it.

    Attributes:
        name: in the state dict.
        kind: the hyper-model that predicts it; for other actions the kind that it is.
        action: what happens.
        reason: why, in words for the user.
        dtype: safetensors name in Θ0, and so in the output.
        shape: its shape.
        elements: number of parameters.
        nbytes: size in Θ0.
        layer: the normalisation layer that it belongs to.
        whole: whether it is predicted from all its elements together, and those of its group.
        movements: how far it moves from session to session, for methods that ask for it.
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
    movements: Movements | None = None


#: Tensors that are predicted whole and together; mostly it is one.
Group = tuple[PlannedTensor, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one tensor's elements among rows: ``[start, start + count)`` at ``row``."""

    tensor: PlannedTensor
    start: int
    count: int
    row: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.row, self.row + self.count)


@dataclass(frozen=True)
class Batch:
    """Rows that are read, predicted and written together: of one kind, or of one group."""

    kind: Kind
    segments: tuple[Segment, ...]
    rows: int

    @cached_property
    def _ends(self) -> list[int]:
        return [segment.row + segment.count for segment in self.segments]

    @cached_property
    def _runs(self) -> tuple[list[int], list[str]]:
        """Where runs of one dtype end, and which it is."""
        ends: list[int] = []
        dtypes: list[str] = []
        for segment in self.segments:
            if dtypes[-1:] == [segment.tensor.dtype]:
                ends.pop()
            else:
                dtypes.append(segment.tensor.dtype)
            ends.append(segment.row + segment.count)
        return ends, dtypes

    def dtypes_of(self, rows: slice) -> Iterator[tuple[str, slice]]:
        """Runs of one dtype among some of its rows, counted from the first of them."""
        ends, dtypes = self._runs
        begin = rows.start
        for which in range(bisect_right(ends, begin), len(ends)):
            if begin >= rows.stop:
                return
            end = min(ends[which], rows.stop)
            yield dtypes[which], slice(begin - rows.start, end - rows.start)
            begin = end

    def block(self, rows: slice) -> Block:
        """Some of its rows, to be predicted in one call."""
        return Block(self, rows)

    def segments_of(self, rows: slice) -> Iterator[Segment]:
        """What some of its rows are, with rows counted from the first of them."""
        for segment in self.segments[bisect_right(self._ends, rows.start) :]:
            begin = max(segment.row, rows.start)
            end = min(segment.row + segment.count, rows.stop)
            if begin >= end:
                return
            yield Segment(
                segment.tensor, segment.start + begin - segment.row, end - begin, begin - rows.start
            )


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a batch that a method predicts in one call.

    Attributes:
        batch: that the rows are of.
        rows: which ones.
    """

    batch: Batch
    rows: slice

    @property
    def kind(self) -> Kind:
        """Of all its rows."""
        return self.batch.kind

    def segments(self) -> Iterator[Segment]:
        """The tensors that its rows are of, with rows counted from the block's first.

        Worked out only for methods that ask: there may be thousands of tiny tensors in a block.
        """
        return self.batch.segments_of(self.rows)

    def dtypes(self) -> Iterator[tuple[str, slice]]:
        """Runs of tensors of one dtype, by its safetensors name, among its rows."""
        return self.batch.dtypes_of(self.rows)


@dataclass(frozen=True)
class Stream:
    """The parameters of one kind that are predicted row by row, tensor after tensor.

    Attributes:
        kind: of all of them.
        tensors: none of which is empty.
        spans: the rows that a plan predicts; each begins where a block does.
    """

    kind: Kind
    tensors: tuple[PlannedTensor, ...]
    spans: tuple[range, ...]

    @staticmethod
    def of(kind: Kind, tensors: tuple[PlannedTensor, ...]) -> Stream:
        """All rows of some tensors."""
        kept = tuple(tensor for tensor in tensors if tensor.elements)
        rows = sum(tensor.elements for tensor in kept)
        return Stream(kind, kept, (range(rows),) if rows else ())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The row after the last one of each tensor."""
        return tuple(accumulate(tensor.elements for tensor in self.tensors))

    @property
    def rows(self) -> int:
        """How many rows a plan predicts of it."""
        return sum(map(len, self.spans))

    def batches(self, batch_rows: int) -> Iterator[Batch]:
        """Its spans, each in batches of ``batch_rows`` rows: small tensors together, large cut."""
        for span in self.spans:
            for begin in range(span.start, span.stop, batch_rows):
                yield self.batch(begin, min(begin + batch_rows, span.stop))

    def batch(self, begin: int, end: int) -> Batch:
        """The rows ``[begin, end)``."""
        segments, row = [], 0
        which = bisect_right(self.ends, begin)
        while begin + row < end:
            tensor = self.tensors[which]
            start = begin + row - (self.ends[which] - tensor.elements)
            count = min(tensor.elements - start, end - begin - row)
            segments.append(Segment(tensor, start, count, row))
            row, which = row + count, which + 1
        return Batch(self.kind, tuple(segments), row)


@dataclass(frozen=True)
class Copy:
    """A run of one tensor's bytes that is copied: ``[start, start + nbytes)``."""

    tensor: PlannedTensor
    start: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before a byte of it has; or a part of it.

    Attributes:
        tensors: every tensor of the output, in the order of Θ0's files.
        streams: what is predicted row by row, kind after kind.
        wholes: groups of tensors that are predicted from all their elements together.
        copies: what is copied byte by byte.
        resets: tensors that get fresh values.
        rescales: running statistics that follow the weights before them.
        averages: running statistics that are averaged as distributions.
        doubles: names of predicted tensors that are float64 in any checkpoint.
        block_rows: rows of a block; each is computed alike wherever batches are cut.
        batch_rows: rows of a full batch.
        stretch_rows: the most rows that are cast and written at a time.
        memory: bytes of working memory that the batches, or the largest group that is needed
            whole, and the predictor need.
        bytes_to_read: of tensor data, from all checkpoints, without the scan for frozen tensors
            and without what is read again of float64 tensors; of the whole plan.
        bytes_to_write: of all outputs together; of the whole plan.
    """

    tensors: tuple[PlannedTensor, ...]
    streams: tuple[Stream, ...]
    wholes: tuple[Group, ...]
    copies: tuple[Copy, ...]
    resets: tuple[PlannedTensor, ...]
    rescales: tuple[PlannedTensor, ...]
    averages: tuple[PlannedTensor, ...]
    doubles: frozenset[str]
    block_rows: int
    batch_rows: int
    stretch_rows: int
    memory: int
    bytes_to_read: int
    bytes_to_write: int

    @property
    def predicts(self) -> bool:
        """Whether any tensor is predicted, be it empty."""
        return any(tensor.action is Action.PREDICT for tensor in self.tensors)

    @property
    def predicted(self) -> int:
        """Parameters that are predicted."""
        rows = sum(stream.rows for stream in self.streams)
        return rows + sum(tensor.elements for group in self.wholes for tensor in group)

    def batches(self) -> Iterator[Batch]:
        """The batches of parameters that are predicted row by row, kind after kind."""
        for stream in self.streams:
            yield from stream.batches(self.batch_rows)

    def whole_tensors(self) -> Iterator[Batch]:
        """Each group that is predicted from all its elements together, as a batch of its own."""
        for group in self.wholes:
            ends = tuple(accumulate(tensor.elements for tensor in group))
            segments = tuple(
                Segment(tensor, 0, tensor.elements, end - tensor.elements)
                for tensor, end in zip(group, ends, strict=True)
            )
            yield Batch(group[0].kind, segments, ends[-1])
