"""What the engine does with every number around a method: read, check, sum, compare, round.

Each function is one compiled pass where there is one, and a few operations of torch or numpy
elsewhere, with the same results, bit for bit; only :func:`change_sums` adds in another order. A
pass holds no interpreter lock, so threads do not wait for each other.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.passes.native import DTYPES, native

#: ``[rows]`` bool. Of so few elements numpy makes and counts masks in a fraction of torch's time.
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Sums = np.ndarray[Any, np.dtype[np.float64]]

# The bits of a float64's fraction that float32 has no room for.
_CUT = (1 << 29) - 1


def can_read(dtype: str) -> bool:
    """Whether :func:`read_finite` reads numbers of a dtype, by its safetensors name."""
    return dtype in DTYPES and native() is not None


def read_finite(descriptor: int, position: int, dtype: str, out: Tensor) -> tuple[int, bool]:
    """Read numbers of a file as float32, and see whether all are finite.

    Args:
        descriptor: of a file that is open for reading.
        position: of the first, in bytes.
        dtype: of the file's numbers; see :func:`can_read`.
        out: contiguous float32, receives them.

    Returns:
        How many were read, fewer than there is room for where the file ends or after a signal,
        and whether all are finite.

    Raises:
        OSError: the file cannot be read.
    """
    library = native()
    assert library is not None
    finite, count = ctypes.c_int32(1), -errno.EINTR
    while count == -errno.EINTR:  # in between, Python sees to the signal
        count = library.passes_read(
            descriptor, position, DTYPES[dtype], out.numel(), out.data_ptr(), ctypes.byref(finite)
        )
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return int(count), bool(finite.value)


def all_finite(values: Tensor) -> bool:
    """Whether all float32 or float64 values are finite, in one pass that makes no masks.

    >>> all_finite(torch.tensor([1.0, -2.0])), all_finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    if not values.numel():
        return True
    library = native()
    if library is not None and values.dtype == torch.float32 and values.is_contiguous():
        return bool(library.passes_finite(values.data_ptr(), values.numel()))
    low, high = torch.aminmax(values)  # what is not a number is both
    return math.isfinite(low) and math.isfinite(high)


def weighted_sum(weights: Sequence[float], rows: Tensor, out: Tensor, *, to_odd: bool) -> None:
    """Σ weights[k] · rows[k] in float64, every product and sum rounded, in the order of the rows.

    Args:
        weights: ``[S]``; rows whose weight is 0 are left out.
        rows: ``[S, n]`` float32 or float64, each row contiguous.
        out: ``[n]`` contiguous, in their dtype; receives the sum, rounded once.
        to_odd: round so that a later rounding to 16 bits is as good as rounding once; see
            :func:`round_to_odd`.
    """
    library = native()
    if library is not None and out.dtype == torch.float32:
        library.passes_sum(
            (ctypes.c_double * len(weights))(*weights), len(weights), rows.data_ptr(),
            rows.stride(0), len(out), to_odd, out.data_ptr(),
        )  # fmt: skip
        return
    total = torch.zeros(out.shape, dtype=torch.float64)
    # Products are rounded before they are added. Whether a fused operation rounds them would
    # depend on a row's place in its block.
    for weight, values in zip(weights, rows, strict=True):
        if weight:
            total.add_(values.to(torch.float64, copy=True).mul_(weight))
    out.copy_(round_to_odd(total) if to_odd else total)


def round_to_odd(values: Tensor) -> Tensor:
    """Round float64 so that what comes after it, float32 and 16 bits, is as good as rounding once.

    Of a number that float32 does not hold, the bits that it has no room for are cut off, and the
    last one that it has is set, so that no later rounding to nearest takes it for a tie ("Emulation
    of FMA and Correctly Rounded Sums: Proved Algorithms Using Rounding to Odd", Boldo and
    Melquiond, IEEE Transactions on Computers 57(4), 2008). Holds for what is normal in float32.

    Args:
        values: float64, contiguous; changed in place.

    >>> values = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    >>> values.float().bfloat16().item(), round_to_odd(values).float().bfloat16().item()
    (1.0, 1.0078125)
    """
    bits = values.view(torch.int64)
    last = bits & _CUT
    last.add_(_CUT).bitwise_and_(_CUT + 1)
    bits.bitwise_or_(last).bitwise_and_(~_CUT)
    return values


def same_bits(window: Tensor) -> Mask | None:
    """Where all values are the same, bit for bit, ``[rows]``; None for nowhere.

    Args:
        window: ``[S, rows]`` float32 or float64, S ≥ 2, each row contiguous.

    >>> same_bits(torch.tensor([[1.0, 0.0, 2.0], [1.0, -0.0, 3.0]]))
    array([ True, False, False])
    """
    library = native()
    if library is not None and window.dtype == torch.float32:
        checkpoints, rows = window.shape
        found: Mask = np.empty(rows, np.bool_)
        count = library.passes_same(
            window.data_ptr(), checkpoints, window.stride(0), rows, found.ctypes.data
        )
        return found if count else None
    *others, newest = window.numpy().view(f"i{window.element_size()}")
    same: Mask = others[-1] == newest
    for other in others[-2::-1]:
        if not same.any():  # as a rule, where all weights are trained
            break
        same &= other == newest
    return same if same.any() else None


def cast_finite(values: Tensor, others: Tensor, mask: Mask | None, dtype: str) -> Tensor | None:
    """Round float32 to another dtype, with other values where a mask says so.

    Args:
        values: ``[rows]`` float32, contiguous.
        others: ``[rows]`` float32, contiguous.
        mask: ``[rows]``, where the others are taken; None for nowhere.
        dtype: of the result, by its safetensors name.

    Returns:
        ``[rows]``; None where a result is not finite, or no compiled pass can do it.
    """
    library = native()
    if library is None or dtype not in DTYPES or dtype == "F64":
        return None
    out = torch.empty(len(values), dtype=_TORCH[dtype])
    is_finite = library.passes_cast(
        values.data_ptr(), others.data_ptr(), None if mask is None else mask.ctypes.data,
        len(values), DTYPES[dtype], out.data_ptr(),
    )  # fmt: skip
    return out if is_finite else None


def change_sums(before: Tensor, after: Tensor, row: int = 0, grid: int = 0) -> Sums:
    """Σ |after − before|, Σ (after − before)² and Σ before² of each cell of a grid, in float64.

    Args:
        before: ``[rows]`` float32 or float64.
        after: ``[rows]`` in any float dtype.
        row: of the first, among those that the grid divides.
        grid: how many rows a cell has; 0 for one cell.

    Returns:
        ``[cells, 3]``.

    >>> change_sums(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.0]), 1, 2)
    array([[1., 1., 1.],
           [2., 4., 5.]])
    """
    rows = len(before)
    grid = grid or max(row + rows, 1)
    leading = min(grid - row % grid, rows)
    library, dtype = native(), _NAMES.get(after.dtype)
    if library is not None and dtype is not None and before.dtype == torch.float32:
        sums = np.empty((-(-(rows - leading) // grid) + bool(leading), 3))
        before, after = before.contiguous(), after.contiguous()
        library.passes_changes(
            before.data_ptr(), after.data_ptr(), DTYPES[dtype], rows, leading, grid,
            sums.ctypes.data,
        )  # fmt: skip
        return sums
    old = before.double().numpy()
    change = after.double().numpy() - old
    cuts = np.array([0, *range(leading, rows, grid)] if rows else [], np.int64)
    with np.errstate(over="ignore"):
        parts = (np.abs(change), np.square(change), np.square(old))
    return np.stack([np.add.reduceat(part, cuts) for part in parts], axis=1)


_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
