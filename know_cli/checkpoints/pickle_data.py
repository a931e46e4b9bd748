"""The data of pickled tensors: whether they are all there, and copied to where they belong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from know_cli.checkpoints.dtypes import BITS, safetensors_dtype
from know_cli.checkpoints.pickle_names import PickledTensor, Storage
from know_cli.checkpoints.torch_files import TorchFile

_MAX_BITS = 2**63


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

    Storages are read once, from their first byte to their last. One is held in memory only if a
    tensor's elements are not side by side in it.

    Args:
        file: that they are in.
        tensors: by name.
        sink: gets each tensor's elements side by side, the last dimension fastest.

    Raises:
        CheckpointError: data are damaged.
        OutputError: the sink cannot take them.
    """
    for storage, views in _by_storage(tensors).items():
        whole = bytearray()
        strided = {name: view for name, view in views.items() if not _is_contiguous(view)}
        dense = [
            (_begin(view), _begin(view) + nbytes_of(view), name)
            for name, view in views.items()
            if name not in strided
        ]
        for position, piece in _placed(file.pieces(storage)):
            dense = _spread(position, memoryview(piece), dense, sink)
            if strided:
                whole += piece
        for name, view in strided.items():
            sink.write(name, 0, _gathered(whole, view))


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


def _gathered(whole: bytearray, view: PickledTensor) -> memoryview:
    """The elements of a view side by side."""
    import numpy as np

    size = BITS[safetensors_dtype(view.dtype)] // 8
    # Dimensions of one element say nothing, and numpy takes fewer dimensions than torch.
    dimensions = [pair for pair in zip(view.shape, view.strides, strict=True) if pair[0] > 1]
    elements = np.ndarray(
        [count for count, _ in dimensions],
        dtype=f"u{size}",
        buffer=whole,
        offset=view.offset * size,
        strides=[stride * size for _, stride in dimensions],
    )
    return np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
