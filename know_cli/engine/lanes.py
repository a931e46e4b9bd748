"""Blocks of rows through devices with memory of their own, several at a time.

A lane is room on a device for one block: memory for its window and its predictions, and a queue
in which copying to the device, computing and copying back follow one another. A device has two
lanes, so that one block is copied while another is computed; several devices of a machine are
more lanes. The thread that hands blocks out only fills queues and waits, so that one is enough.

Results come in the order of the blocks, and a block's does not depend on the lane that it took:
each device computes it alike, whatever is beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

import torch
from torch import Tensor

from know_cli.engine.plan import Batch, Block
from know_cli.errors import UsageError
from know_cli.kinds import Kind

#: Lanes of a device.
LANES = 2


class DeviceKernel(Protocol):
    """A hyper-model for one kind, on a device."""

    def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
        """Predict all steps of one block, or start to.

        Where a prediction is not finite, the steps after it go on from θ0.

        Args:
            block: of which tensors the rows are.
            history: ``[S, rows]`` float32 on the device, most-forgotten first, θ0 last.
            out: ``[steps, rows]`` float32 on the device, receives θ̂(−1), θ̂(−2), …
        """


class Queue(Protocol):
    """Work on a device that is done in order, beside that of other queues.

    Attributes:
        overlaps: whether what is put in returns before it is done.
    """

    overlaps: bool

    def filling(self) -> AbstractContextManager[object]:
        """What torch is told inside goes into this queue."""

    def wait(self) -> None:
        """Return when all that was put in is done; errors of it are raised here."""


class Direct:
    """No queue: what torch is told is done when it returns."""

    overlaps = False

    def filling(self) -> AbstractContextManager[object]:
        """See :class:`Queue`."""
        return nullcontext()

    def wait(self) -> None:
        """See :class:`Queue`."""


class CudaQueue:
    """A stream of a CUDA device (https://docs.pytorch.org/docs/stable/notes/cuda.html).

    Args:
        device: a CUDA device.
    """

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def filling(self) -> AbstractContextManager[object]:
        """See :class:`Queue`; the stream's device is the current one inside."""
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """See :class:`Queue`."""
        self._stream.synchronize()


class Lane:
    """Room on a device for one block.

    Args:
        kernels: one for each kind, for this lane alone.
        checkpoints: S.
        steps: how many are predicted.
        block_rows: the most rows of a block.
        device: where the kernels are.
        queue: where its work goes.

    Attributes:
        overlaps: whether copies of page-locked memory return before they are done.
    """

    def __init__(
        self,
        kernels: Mapping[Kind, DeviceKernel],
        checkpoints: int,
        steps: int,
        block_rows: int,
        device: torch.device,
        queue: Queue,
    ) -> None:
        self.device = device
        self.block_rows = block_rows
        self.overlaps = queue.overlaps
        self._kernels = kernels
        self._queue = queue
        self._window = torch.empty(checkpoints, block_rows, device=device)
        self._out = torch.empty(steps, block_rows, device=device)
        #: For what travels in 16 bits; torch would convert on the CPU what is copied across.
        self._halves = torch.empty(
            checkpoints + steps, block_rows, dtype=torch.float16, device=device
        )

    def start(self, block: Block, window: Tensor, out: Tensor) -> None:
        """Begin with a block. Both tensors belong to the lane until :meth:`finish` returns.

        Args:
            block: of what kind the rows are, and of which tensors.
            window: ``[S, rows]`` on the CPU, most-forgotten first, θ0 last: float32, or one of the
                types of 16 bits, which is widened on the device.
            out: ``[steps, rows]`` on the CPU, of the same type, receives all steps, rounded.
        """
        rows, size = window.shape[1], len(window)
        own, own_out = self._window[:, :rows], self._out[:, :rows]
        arriving, leaving = own, own_out
        if window.dtype != torch.float32:
            halves = self._halves.view(window.dtype)[:, :rows]
            arriving, leaving = halves[:size], halves[size:]
        with self._queue.filling():
            # Row by row, since only what lies together is copied without a stop on the way.
            for to, values in zip(arriving, window, strict=True):
                to.copy_(values, non_blocking=self.overlaps)
            if arriving is not own:
                own.copy_(arriving)
            self._kernels[block.kind].predict(block, own, own_out)
            if leaving is not own_out:
                leaving.copy_(own_out)
            for to, values in zip(out, leaving, strict=True):
                to.copy_(values, non_blocking=self.overlaps)

    def finish(self) -> None:
        """Return when the block is done, and its predictions are on the CPU."""
        self._queue.wait()


class DevicePredictor:
    """A method that predicts whole batches on devices, all steps at once.

    Args:
        lanes: of all devices, in the order in which they get blocks.
        checkpoints: S.
        kernel: what the lanes' kernels are called; others may round differently.
        notices: what the user should know of the devices.

    Attributes:
        devices: all of them.
        block_rows: the most rows that a lane takes.
        pinned: whether batches should be in page-locked memory, which a device copies by itself
            while other work goes on.
        thread_bytes: main memory that it needs in each worker thread: it uses none.
    """

    thread_bytes = 0

    def __init__(
        self, lanes: Sequence[Lane], checkpoints: int, kernel: str, notices: Sequence[str] = ()
    ) -> None:
        self._lanes = lanes
        self._checkpoints = checkpoints
        self.block_rows = lanes[0].block_rows
        self.kernel = kernel
        self.notices = tuple(notices)
        self.devices = tuple(dict.fromkeys(lane.device for lane in lanes))
        self.pinned = any(lane.overlaps for lane in lanes)

    def predict(self, batch: Batch, history: Tensor) -> Generator[slice, None, None]:
        """Predict a batch; it must be run to its end, or closed, before the batch is used.

        Args:
            batch: whose rows these are.
            history: ``[S + steps, rows]`` on the CPU, float32 or of 16 bits: the window,
                most-forgotten first, θ0 at S − 1, then what receives the predictions.

        Yields:
            The rows of each block that is done, in order.

        Raises:
            UsageError: a device fails.
        """
        window, out = history[: self._checkpoints], history[self._checkpoints :]
        free, busy = deque(self._lanes), deque[tuple[Lane, slice]]()
        try:
            for start in range(0, history.shape[1], self.block_rows):
                if not free:
                    yield self._finish(free, busy)
                rows = slice(start, min(start + self.block_rows, history.shape[1]))
                lane = free.popleft()
                busy.append((lane, rows))
                with failures_of(lane.device):
                    lane.start(batch.block(rows), window[:, rows], out[:, rows])
            while busy:
                yield self._finish(free, busy)
        finally:
            # Also after an error: a device must not write into memory that others will reuse.
            for lane, _ in busy:
                with suppress(Exception):
                    lane.finish()

    def _finish(self, free: deque[Lane], busy: deque[tuple[Lane, slice]]) -> slice:
        lane, rows = busy.popleft()
        with failures_of(lane.device):
            lane.finish()
        free.append(lane)
        return rows


@contextmanager
def failures_of(device: torch.device) -> Iterator[None]:
    """What torch raises where a device fails becomes an error for the user.

    Raises:
        UsageError: of what was a ``RuntimeError``.
    """
    try:
        yield
    except RuntimeError as error:
        raise UsageError(
            f"--device {device}: the device failed: {first_line(error)}; try another, such as cpu"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may have many."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
