"""Which part of a plan each rank executes, and what the parts add up to.

The streams of rows are cut between blocks, so that every block is computed as one process alone
would; tensors that are needed whole are given out whole; copied tensors are cut anywhere.
Each of the three is cut into as many runs as there are ranks, with about the same bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.engine.plan import Action, Batch, Copy, Plan, PlannedTensor, cut_batches
from know_cli.kinds import PREDICTED_KINDS
from know_cli.ranks.alone import Ranks

# Where copied tensors are cut: a multiple of all element sizes, and of what is copied at a time.
_COPY_GRID = 1 << 20


@dataclass(frozen=True)
class Share(Plan):
    """The part of a plan that one rank executes; ``tensors`` are those of the whole.

    Attributes:
        block_rows: rows of a block.
        rank: whose part it is.
        size: how many ranks there are.
    """

    block_rows: int
    rank: int
    size: int

    @property
    def predicted(self) -> int:
        """Parameters that this rank predicts."""
        streams = self._streams()
        return sum(map(len, streams)) + sum(batch.rows for batch in self.whole_tensors())

    def batches(self) -> Iterator[Batch]:
        """This rank's batches of rows, kind after kind."""
        for kind, rows in zip(PREDICTED_KINDS, self._streams(), strict=True):
            yield from cut_batches(kind, self.stream(kind), self.batch_rows, rows)

    def whole_tensors(self) -> Iterator[Batch]:
        """This rank's tensors that are predicted from all their elements together."""
        batches = list(super().whole_tensors())
        sizes = [batch.segments[0].tensor.nbytes for batch in batches]
        position, total = 0, sum(sizes)
        for batch, nbytes in zip(batches, sizes, strict=True):
            # Whose run has the tensor's middle.
            if (2 * position + nbytes) * self.size // max(2 * total, 1) == self.rank:
                yield batch
            position += nbytes

    def copies(self) -> Iterator[Copy]:
        """This rank's parts of the copied tensors."""
        tensors = self.with_action(Action.COPY)
        begin, end = self._run(sum(tensor.nbytes for tensor in tensors))
        position = 0
        for tensor in tensors:
            start, stop = (_copy_cut(tensor, target - position) for target in (begin, end))
            if start < stop:
                yield Copy(tensor, start, stop - start)
            position += tensor.nbytes

    def _streams(self) -> list[range]:
        """Of each kind, the rows of its stream that are this rank's."""
        streams = [self.stream(kind) for kind in PREDICTED_KINDS]
        sizes = [sum(tensor.nbytes for tensor in stream) for stream in streams]
        begin, end = self._run(sum(sizes))
        position, rows = 0, []
        for stream, nbytes in zip(streams, sizes, strict=True):
            start, stop = (
                _row_cut(stream, target - position, self.block_rows) for target in (begin, end)
            )
            rows.append(range(start, stop))
            position += nbytes
        return rows

    def _run(self, nbytes: int) -> tuple[int, int]:
        return nbytes * self.rank // self.size, nbytes * (self.rank + 1) // self.size


def share(plan: Plan, ranks: Ranks, block_rows: int) -> Plan:
    """A rank's part of a plan; all of it where there is one rank.

    Args:
        plan: the whole, the same on all ranks but for the size of batches.
        ranks: of which this process is one.
        block_rows: rows of a block.
    """
    if ranks.size == 1:
        return plan
    return Share(
        plan.tensors,
        plan.batch_rows,
        plan.memory,
        plan.bytes_to_read,
        plan.bytes_to_write,
        block_rows,
        ranks.rank,
        ranks.size,
    )


def _row_cut(stream: Sequence[PlannedTensor], nbytes: int, block_rows: int) -> int:
    """The start of a block that about so many bytes of a stream come before."""
    rows = sum(tensor.elements for tensor in stream)
    row, left = 0, max(nbytes, 0)
    for tensor in stream:
        if left < tensor.nbytes:
            row += left // torch_dtype(tensor.dtype).itemsize
            return min((row + block_rows // 2) // block_rows * block_rows, rows)
        row, left = row + tensor.elements, left - tensor.nbytes
    return rows


def _copy_cut(tensor: PlannedTensor, nbytes: int) -> int:
    if nbytes >= tensor.nbytes:
        return tensor.nbytes
    return max(nbytes, 0) // _COPY_GRID * _COPY_GRID
