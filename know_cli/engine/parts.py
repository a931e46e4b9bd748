"""Parts of a plan, which are plans again: one rank's share, and a random sample.

Streams of rows are cut between blocks, so that every block is computed as in the whole; groups of
tensors that are needed whole are given out whole; copied tensors are cut anywhere.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.engine.plan import Copy, Group, Plan, Stream

# Where copied tensors are cut: a multiple of all element sizes, and of what is copied at a time.
_COPY_GRID = 1 << 20
# Bytes of copied tensors that a sample has at most.
_COPIED_BYTES = 64 << 20


def share(plan: Plan, rank: int, size: int) -> Plan:
    """The part of a plan that one of several ranks executes.

    Streams, whole groups and copies are each cut into as many runs as there are ranks, with
    about the same bytes each. What is reset, rescaled or averaged as a distribution stays in every
    part: rank 0 does it, but each rank has to know which weights it takes sums of.

    Args:
        plan: the whole, the same on all ranks but for the size of batches.
        rank: whose part, 0 … size − 1.
        size: how many ranks there are.
    """
    if size == 1:
        return plan
    return replace(
        plan,
        streams=_share_of_streams(plan.streams, plan.block_rows, rank, size),
        wholes=_share_of_wholes(plan.wholes, rank, size),
        copies=_share_of_copies(plan.copies, rank, size),
    )


def sample(plan: Plan, spans: int, seed: int) -> Plan:
    """Random blocks and whole groups of a plan, and some of what is copied.

    Running statistics that are rescaled are left out: each needs a whole layer.

    Args:
        plan: the whole, or a part.
        spans: how many blocks and whole groups are taken, each with the same chance; all, if
            there are no more.
        seed: which ones.
    """
    chance = random.Random(seed)
    cut = [_Blocks.of(stream, plan.block_rows) for stream in plan.streams]
    firsts = [0, *accumulate(len(blocks) for blocks in cut)]
    total = firsts[-1] + len(plan.wholes)
    taken: list[list[range]] = [[] for _ in cut]
    wholes = []
    for number in sorted(chance.sample(range(total), min(spans, total))):
        if number >= firsts[-1]:
            wholes.append(plan.wholes[number - firsts[-1]])
            continue
        which = bisect_right(firsts, number) - 1
        taken[which].append(cut[which].block(number - firsts[which]))
    streams = tuple(
        replace(stream, spans=tuple(blocks))
        for stream, blocks in zip(plan.streams, taken, strict=True)
    )
    copies = list(plan.copies)
    chance.shuffle(copies)
    room, kept = _COPIED_BYTES, []
    for copy in copies:
        if copy.nbytes <= room:
            room -= copy.nbytes
            kept.append(copy)
    return replace(plan, streams=streams, wholes=tuple(wholes), copies=tuple(kept), rescales=())


@dataclass(frozen=True)
class _Blocks:
    """The blocks of a stream's spans, found by number without listing them."""

    spans: tuple[range, ...]
    ends: tuple[int, ...]
    block_rows: int

    @staticmethod
    def of(stream: Stream, block_rows: int) -> _Blocks:
        counts = (-(-len(span) // block_rows) for span in stream.spans)
        return _Blocks(stream.spans, tuple(accumulate(counts)), block_rows)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def block(self, number: int) -> range:
        which = bisect_right(self.ends, number)
        span = self.spans[which]
        before = self.ends[which - 1] if which else 0
        begin = span.start + (number - before) * self.block_rows
        return range(begin, min(begin + self.block_rows, span.stop))


def _run(nbytes: int, rank: int, size: int) -> tuple[int, int]:
    return nbytes * rank // size, nbytes * (rank + 1) // size


def _share_of_streams(
    streams: Sequence[Stream], block_rows: int, rank: int, size: int
) -> tuple[Stream, ...]:
    measured = [_Bytes.of(stream) for stream in streams]
    begin, end = _run(sum(of.total for of in measured), rank, size)
    position, shares = 0, []
    for stream, of in zip(streams, measured, strict=True):
        first, last = (of.cut(target - position, block_rows) for target in (begin, end))
        shares.append(replace(stream, spans=_between(stream.spans, first, last)))
        position += of.total
    return tuple(shares)


@dataclass(frozen=True)
class _Bytes:
    """How many bytes the rows of a stream have in Θ0."""

    stream: Stream
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @staticmethod
    def of(stream: Stream) -> _Bytes:
        starts = (0, *accumulate(tensor.nbytes for tensor in stream.tensors))
        unmeasured = _Bytes(stream, starts, ())
        lengths = (unmeasured._at(s.stop) - unmeasured._at(s.start) for s in stream.spans)
        return _Bytes(stream, starts, tuple(lengths))

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def _at(self, row: int) -> int:
        """Bytes of the tensors before a row."""
        which = bisect_right(self.stream.ends, row)
        if which == len(self.stream.tensors):
            return self.starts[-1]
        tensor = self.stream.tensors[which]
        first = self.stream.ends[which] - tensor.elements
        return self.starts[which] + (row - first) * torch_dtype(tensor.dtype).itemsize

    def _row(self, position: int) -> int:
        """The row that a byte is of."""
        which = bisect_right(self.starts, position) - 1
        tensor = self.stream.tensors[which]
        first = self.stream.ends[which] - tensor.elements
        return first + (position - self.starts[which]) // torch_dtype(tensor.dtype).itemsize

    def cut(self, nbytes: int, block_rows: int) -> int:
        """The start of a block that about so many bytes of the spans come before."""
        left = max(nbytes, 0)
        for span, length in zip(self.stream.spans, self.lengths, strict=True):
            if left < length:
                row = self._row(self._at(span.start) + left)
                cut = span.start + (row - span.start + block_rows // 2) // block_rows * block_rows
                return min(cut, span.stop)
            left -= length
        return self.stream.spans[-1].stop if self.stream.spans else 0


def _between(spans: Sequence[range], first: int, last: int) -> tuple[range, ...]:
    cut = (range(max(span.start, first), min(span.stop, last)) for span in spans)
    return tuple(span for span in cut if span)


def _share_of_wholes(wholes: Sequence[Group], rank: int, size: int) -> tuple[Group, ...]:
    sizes = [sum(tensor.nbytes for tensor in group) for group in wholes]
    position, total = 0, max(sum(sizes), 1)
    kept = []
    for group, nbytes in zip(wholes, sizes, strict=True):
        # Whose run has the group's middle.
        whose = (2 * position + nbytes) * size // (2 * total)
        if min(whose, size - 1) == rank:
            kept.append(group)
        position += nbytes
    return tuple(kept)


def _share_of_copies(copies: Sequence[Copy], rank: int, size: int) -> tuple[Copy, ...]:
    begin, end = _run(sum(copy.nbytes for copy in copies), rank, size)
    position, kept = 0, []
    for copy in copies:
        start, stop = (_copy_cut(copy, target - position) for target in (begin, end))
        if start < stop:
            kept.append(Copy(copy.tensor, start, stop - start))
        position += copy.nbytes
    return tuple(kept)


def _copy_cut(copy: Copy, nbytes: int) -> int:
    """The offset in a tensor's bytes at which a copy is cut to have about so many before it."""
    if nbytes >= copy.nbytes:
        return copy.start + copy.nbytes
    return max(copy.start, (copy.start + max(nbytes, 0)) // _COPY_GRID * _COPY_GRID)
