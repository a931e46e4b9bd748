"""What is done with every number around a method, stage by stage, with one thread and with several.

The stages are those of a prediction of 16-bit and of float32 checkpoints: their bytes are read
(from the page cache), widened to float32 and checked; summed; compared with Θ0's; rounded to their
own type; the change is measured; and the bytes are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from know_cli.benchmark.scaling import Scaling, by_threads
from know_cli.benchmark.timing import take_turns
from know_cli.checkpoints.dtypes import FLOATS, torch_dtype
from know_cli.checkpoints.reading import CHUNK_ROWS, as_bytes
from know_cli.files import new_file, open_file, remove_file
from know_cli.passes.numbers import (
    can_read,
    cast_finite,
    change_sums,
    read_finite,
    same_bits,
    weighted_sum,
)

_DTYPES = ("BF16", "F32")
_CHECKPOINTS = 5

#: What a stage does with so many rows from one on.
Stage = Callable[[int, int], object]


def measure_stages(folder: Path, rows: int, rounds: int, threads: int) -> Scaling:
    """Time each stage over so many parameters; where bytes are read, over those of one checkpoint.

    Args:
        folder: for files of the parameters of one checkpoint, which are removed afterwards.
        rows: parameters.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.
        threads: the most.

    Returns:
        Times by stage and number of threads; none where no passes were compiled.

    Raises:
        OSError: the folder cannot be written.
    """
    if not can_read("F32"):
        return {}
    cases: dict[str, Callable[[], object]] = {}
    keys: dict[str, tuple[str, int]] = {}
    with ExitStack() as stack:
        counts = sorted({1, threads})
        pools = {n: stack.enter_context(ThreadPoolExecutor(n)) for n in counts}
        for dtype in _DTYPES:
            path = folder / f"{dtype}.bin"
            stack.callback(remove_file, path)
            for name, stage in _stages(path, dtype, rows, stack).items():
                for count in counts:
                    label = f"{name}, {count}"
                    keys[label] = name, count
                    cases[label] = _in_chunks(stage, rows, pools[count], count)
        return by_threads(take_turns(cases, rounds), keys)


def _stages(path: Path, dtype: str, rows: int, stack: ExitStack) -> dict[str, Stage]:
    """The stages of one type, on data of their own."""
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.standard_normal((_CHECKPOINTS, rows), dtype=np.float32))
    stored = values.to(torch_dtype(dtype))
    window, cast = stored.float(), stored[-1].clone()
    size, named = stored.element_size(), FLOATS[dtype]
    file = stack.enter_context(new_file(path))
    file.write(as_bytes(cast))
    file.flush()
    source = stack.enter_context(open_file(path)).fileno()
    out, buffer = torch.empty(rows), memoryview(bytearray(rows * size))
    weights = [1 / _CHECKPOINTS] * _CHECKPOINTS

    def place(of: Tensor, first: int, count: int) -> Tensor:
        return of[first : first + count]

    return {
        f"bytes in, {named}": lambda first, count: os.preadv(
            source, [buffer[first * size : (first + count) * size]], first * size
        ),
        f"read, widened and checked, {named}": lambda first, count: read_finite(
            source, first * size, dtype, place(out, first, count)
        ),
        f"mean of {_CHECKPOINTS}, {named}": lambda first, count: weighted_sum(
            weights, window[:, first : first + count], place(out, first, count),
            to_odd=dtype != "F32",
        ),
        f"compared, {named}": lambda first, count: same_bits(window[:, first : first + count]),
        f"rounded, {named}": lambda first, count: cast_finite(
            place(window[-1], first, count), place(window[0], first, count), None, dtype
        ),
        f"change measured, {named}": lambda first, count: change_sums(
            place(window[-1], first, count), place(cast, first, count)
        ),
        f"bytes out, {named}": lambda first, count: os.pwrite(
            file.fileno(), as_bytes(place(cast, first, count)), first * size
        ),
    }  # fmt: skip


def _in_chunks(
    stage: Stage, rows: int, pool: ThreadPoolExecutor, threads: int
) -> Callable[[], None]:
    """A function that runs a stage over all rows in chunks, in threads of a pool."""
    starts = range(0, rows, CHUNK_ROWS)

    def some(own: Sequence[int]) -> None:
        for first in own:
            stage(first, min(CHUNK_ROWS, rows - first))

    def run() -> None:
        for job in [pool.submit(some, starts[k::threads]) for k in range(threads)]:
            job.result()

    return run
