"""Reads tensors of checkpoints into float32 buffers, some elements at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry
from know_cli.checkpoints.dtypes import BITS, FLOATS, TORCH_NAMES, torch_dtype
from know_cli.errors import CheckpointError, quoted
from know_cli.passes.numbers import all_finite, can_read, read_finite

#: Elements that are converted, checked and written at a time; torch uses one thread for so few.
CHUNK_ROWS = 1 << 15
_DTYPES = {name: torch_dtype(name) for name in FLOATS}


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any dtype, to read into or write from.

    >>> as_bytes(torch.tensor([1.0])).tolist()
    [0, 0, 128, 63]
    """
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def chunks(start: int, count: int, rows: int = CHUNK_ROWS) -> Iterator[tuple[int, int]]:
    """Cut a range into (start, count) pieces at the multiples of ``rows``.

    >>> list(chunks(5, 10, rows=8))
    [(5, 3), (8, 7)]
    """
    stop = start + count
    while start < stop:
        end = min(stop, (start // rows + 1) * rows)
        yield start, end - start
        start = end


def read_elements(checkpoint: Checkpoint, entry: TensorEntry, start: int, count: int) -> Tensor:
    """Read elements ``[start, start + count)`` of a tensor, flattened, in its own (float) dtype.

    Raises:
        CheckpointError: the file cannot be read.
    """
    values = torch.empty(count, dtype=_DTYPES[entry.info.dtype])
    if count:
        checkpoint.read_into(entry, start * values.element_size(), as_bytes(values))
    return values


def read_tensor(checkpoint: Checkpoint, entry: TensorEntry) -> Tensor:
    """Read a whole tensor of any dtype, in its own shape; two values of four bits are an element.

    The file is not mapped: one that is cut off meanwhile would end the process.

    Raises:
        CheckpointError: the file cannot be read, or torch has no such dtype.
    """
    dtype = getattr(torch, TORCH_NAMES.get(entry.dtype, ""), None)
    if dtype is None:
        raise CheckpointError(
            f"{entry.path}: tensor {quoted(entry.name)}: is {entry.dtype}, for which PyTorch "
            f"{torch.__version__} has no type"
        )
    data = torch.empty(entry.info.end - entry.info.begin, dtype=torch.uint8)
    checkpoint.read_into(entry, 0, data.numpy().data)
    shape = entry.shape
    if BITS[entry.dtype] < 8:
        shape = (*shape[:-1], shape[-1] * BITS[entry.dtype] // 8)
    return data.view(dtype).reshape(shape)


def read_bytes(checkpoint: Checkpoint, entry: TensorEntry, start: int, count: int) -> bytearray:
    """Read elements ``[start, start + count)`` of a (float) tensor as the bytes in the file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    size = _DTYPES[entry.info.dtype].itemsize
    data = bytearray(count * size)
    checkpoint.read_into(entry, start * size, memoryview(data))
    return data


def read_float32(checkpoint: Checkpoint, entry: TensorEntry, start: int, out: Tensor) -> bool:
    """Read ``out.numel()`` elements from ``start`` on as float32, into a contiguous ``out``.

    Returns:
        Whether all are finite.

    Raises:
        CheckpointError: the file cannot be read.
    """
    dtype, finite = entry.info.dtype, True
    if can_read(dtype):
        size = _DTYPES[dtype].itemsize

        def read(descriptor: int, done: int) -> int:
            nonlocal finite
            position = entry.info.begin + (start + done) * size
            count, are_finite = read_finite(descriptor, position, dtype, out[done:])
            finite &= are_finite
            return count

        checkpoint.read_with(entry, out.numel(), read)
        return finite
    # In chunks, which are checked while they are in the cache.
    for begin, count in chunks(0, out.numel()):
        part = out[begin : begin + count]
        if dtype == "F32":
            checkpoint.read_into(entry, (start + begin) * 4, as_bytes(part))
        else:
            part.copy_(read_elements(checkpoint, entry, start + begin, count))
        finite &= all_finite(part)
    return finite
