"""The data of pickled tensors: whether they are all there, and copied to where they belong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from know_cli.checkpoints.dtypes import BITS, safetensors_dtype
from know_cli.checkpoints.pickle_names import PickledTensor, Storage
from know_cli.checkpoints.torch_files import TorchFile

_MAX_BITS = 2**63
# What is gathered at a time of elements that are not side by side.
_BLOCK_BYTES = 8 << 20


class TensorSink(Protocol):
    """Where bytes of tensors go; a checkpoint's writer is one."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of one tensor, ``offset`` counted from the start of its data."""


def nbytes_of(tensor: PickledTensor) -> int:
    """Size of a tensor's data in a safetensors file, in bytes.

    Raises:
        KeyError: the format does not have its element type.
    """
    return math.prod(tensor.shape) * BITS[safetensors_dtype(tensor.dtype)] // 8


def problem_of(file: TorchFile, tensor: PickledTensor) -> str:
    """Why a tensor cannot be written as it is; empty if it can."""
    if tensor.problem or tensor.storage is None:
        return tensor.problem
    try:
        bits = BITS[safetensors_dtype(tensor.dtype)]
    except KeyError:
        return f"safetensors files have no dtype torch.{tensor.dtype}"
    if math.prod(size or 1 for size in tensor.shape) * bits >= _MAX_BITS:
        return "has a shape that is larger than can be counted"
    problem = file.check(tensor.storage)
    if problem or 0 in tensor.shape:
        return problem
    # A few bytes can claim to be any number of elements, all the same.
    if nbytes_of(tensor) > tensor.storage.nbytes:
        return "is larger than the data it is made of; save a copy of it"
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if (last + 1) * bits // 8 > tensor.storage.nbytes:
        return "lies outside of its storage; the file is damaged"
    return ""


def shared_memory(tensors: Mapping[str, PickledTensor]) -> list[list[str]]:
    """Names whose tensors are of one storage, in groups."""
    return [list(views) for views in _by_storage(tensors).values() if len(views) > 1]


def copy_data(file: TorchFile, tensors: Mapping[str, PickledTensor], sink: TensorSink) -> None:
    """Copy the data of tensors that :func:`problem_of` has nothing against.

    Storages are read once, from their first byte to their last. Where a tensor's elements are not
    side by side in one, they are taken in blocks, and what lies between a block's first and last
    element is held in memory: some megabytes where blocks lie one behind the other, as of slices,
    and at most all from the tensor's first to its last element, as where it is transposed.

    Args:
        file: that they are in.
        tensors: by name.
        sink: gets each tensor's elements side by side, the last dimension fastest.

    Raises:
        CheckpointError: data are damaged.
        OutputError: the sink cannot take them.
    """
    for storage, views in _by_storage(tensors).items():
        strided = {name: view for name, view in views.items() if not _is_contiguous(view)}
        dense = [
            (_begin(view), _begin(view) + nbytes_of(view), name)
            for name, view in views.items()
            if name not in strided
        ]
        gathering = _Gathering(strided, sink)
        for position, piece in _placed(file.pieces(storage)):
            dense = _spread(position, memoryview(piece), dense, sink)
            gathering.take(position, memoryview(piece))


def _by_storage(tensors: Mapping[str, PickledTensor]) -> dict[Storage, dict[str, PickledTensor]]:
    """Tensors that have any elements, by where these are.

    Storages of one key are one, as what types ever their views had.
    """
    storages: dict[str, Storage] = {}
    found: dict[Storage, dict[str, PickledTensor]] = {}
    for name, tensor in tensors.items():
        if tensor.storage is not None and 0 not in tensor.shape:
            storage = storages.setdefault(tensor.storage.key, tensor.storage)
            found.setdefault(storage, {})[name] = tensor
    return found


def _begin(view: PickledTensor) -> int:
    return view.offset * BITS[safetensors_dtype(view.dtype)] // 8


def _is_contiguous(tensor: PickledTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _placed(pieces: Iterable[bytes]) -> Iterable[tuple[int, bytes]]:
    position = 0
    for piece in pieces:
        yield position, piece
        position += len(piece)


def _spread(
    position: int, piece: memoryview, dense: list[tuple[int, int, str]], sink: TensorSink
) -> list[tuple[int, int, str]]:
    """Write what a piece of a storage has of each tensor; the tensors that go on behind it."""
    end = position + len(piece)
    for first, last, name in dense:
        start, stop = max(first, position), min(last, end)
        if start < stop:
            sink.write(name, start - first, piece[start - position : stop - position])
    return [one for one in dense if one[1] > end]


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements of a strided tensor that are written together.

    Attributes:
        name: of the tensor.
        begin: the first element's first byte in the storage.
        end: behind the last element's last byte there.
        target: where in the tensor's data they belong, in bytes.
        element_bytes: size of an element.
        dimensions: size and stride of each, in elements; none of one element.
    """

    name: str
    begin: int
    end: int
    target: int
    element_bytes: int
    dimensions: tuple[tuple[int, int], ...]


class _Gathering:
    """Writes strided tensors from a storage that passes by.

    Args:
        views: of the storage, by name.
        sink: gets their elements.
    """

    def __init__(self, views: Mapping[str, PickledTensor], sink: TensorSink) -> None:
        blocks = [block for name, view in views.items() for block in _blocks_of(name, view)]
        self._waiting = deque(sorted(blocks, key=lambda block: block.begin))
        self._open: list[_Block] = []
        self._held, self._first = bytearray(), 0
        self._sink = sink

    def take(self, position: int, piece: memoryview) -> None:
        """Take the next piece of the storage, which begins at a byte of it.

        Raises:
            OutputError: the sink cannot take what is complete with it.
        """
        end = position + len(piece)
        while self._waiting and self._waiting[0].begin < end:
            self._open.append(self._waiting.popleft())
        if not self._open:
            return
        if not self._held:
            self._first = min(block.begin for block in self._open)
        self._held += piece[max(self._first - position, 0) :]
        left = []
        for block in self._open:
            if block.end > end:
                left.append(block)
            else:
                self._sink.write(block.name, block.target, self._elements(block))
        self._open = left
        first = min((block.begin for block in left), default=end)
        del self._held[: first - self._first]
        self._first = first

    def _elements(self, block: _Block) -> memoryview:
        """The elements of a block side by side."""
        import numpy as np

        elements = np.ndarray(
            [count for count, _ in block.dimensions],
            dtype=f"u{block.element_bytes}",
            buffer=self._held,
            offset=block.begin - self._first,
            strides=[stride * block.element_bytes for _, stride in block.dimensions],
        )
        return np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data


def _blocks_of(name: str, view: PickledTensor) -> Iterator[_Block]:
    """Cut a tensor that has elements into blocks."""
    size = BITS[safetensors_dtype(view.dtype)] // 8

    def cut(
        first: int, target: int, dimensions: Sequence[tuple[int, int]], apart: bool
    ) -> Iterator[_Block]:
        # apart: whether all that it was cut off from lies before or behind it in the storage. If
        # not, smaller blocks would not be complete any sooner.
        count, span = math.prod(n for n, _ in dimensions), _span(dimensions)
        rows, *inner = dimensions or [(1, 0)]
        row_count, row_span, stride = math.prod(n for n, _ in inner), _span(inner), rows[1]
        apart = apart and stride >= row_span
        too_long = apart and span * size > _BLOCK_BYTES
        if not dimensions or (count * size <= _BLOCK_BYTES and not too_long):
            begin = first * size
            yield _Block(name, begin, begin + span * size, target, size, tuple(dimensions))
            return
        together = max(1, _BLOCK_BYTES // (max(row_count, stride if too_long else 0) * size))
        for row in range(0, rows[0], together):
            taken = min(together, rows[0] - row)
            yield from cut(
                first + row * stride,
                target + row * row_count * size,
                [(taken, stride), *inner] if taken > 1 else inner,
                apart,
            )

    # Dimensions of one element say nothing, and numpy takes fewer dimensions than torch.
    pairs = zip(view.shape, view.strides, strict=True)
    return cut(view.offset, 0, [pair for pair in pairs if pair[0] > 1], True)


def _span(dimensions: Sequence[tuple[int, int]]) -> int:
    """Elements of a storage from the first to the last of what has these sizes and strides."""
    return 1 + sum((count - 1) * stride for count, stride in dimensions)
