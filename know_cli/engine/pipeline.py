"""Batches through a method: while one is computed, the next is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import Tensor

from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.checkpoints.reading import chunks, read_float32
from know_cli.engine.batches import Buffer
from know_cli.engine.delivery import Delivery, can_be_of
from know_cli.engine.job import Job
from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.plan import Batch
from know_cli.engine.planning import batches_in_memory
from know_cli.engine.predictor import Predictor, TensorPredictor
from know_cli.errors import CheckpointError
from know_cli.passes.numbers import all_finite

# Blocks are handed to workers in groups: small enough that all finish together, large enough
# that handing them out costs nothing.
_GROUPS_PER_THREAD = 4


def predict(job: Job, delivery: Delivery) -> None:
    """All batches of a job's plan, then the tensors that are needed whole.

    Raises:
        CheckpointError: an input cannot be read, or it or a prediction of it has values that are
            not finite.
        OutputError: an output cannot be written.
        PeerError: another rank has failed.
    """
    with ExitStack() as stack:
        reader, workers = open_pools(stack, job.settings.threads)
        writer = None
        if batches_in_memory(job.settings.threads) > 2:
            writer = stack.enter_context(one_thread("write"))
        pipeline = Pipeline(job, delivery, reader, workers, writer)
        pipeline.predict_batches(pipeline.unfinished(job.plan.batches()))
        pipeline.predict_wholes()


def open_pools(stack: ExitStack, threads: int) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
    """One thread that reads ahead, and those that compute; the stack ends them."""
    # One thread a block: the pools are the parallelism, and a result must not depend on how many
    # threads share a matrix product.
    workers = ThreadPoolExecutor(
        threads, "predict", initializer=torch.set_num_threads, initargs=(1,)
    )
    return stack.enter_context(one_thread("read")), stack.enter_context(workers)


def one_thread(name: str) -> ThreadPoolExecutor:
    """A thread that does one thing after the other."""
    return ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(1,))


class Pipeline:
    """The threads of one job, and the batches that are in memory.

    Args:
        job: that is executed.
        delivery: of the same job.
        reader: reads ahead, in one thread.
        workers: compute.
        writer: one thread, which casts, checks and writes a batch while the next is computed;
            None for the one that calls.
    """

    def __init__(
        self,
        job: Job,
        delivery: Delivery,
        reader: ThreadPoolExecutor,
        workers: ThreadPoolExecutor,
        writer: ThreadPoolExecutor | None = None,
    ) -> None:
        self._job = job
        self._delivery = delivery
        self._reader = reader
        self._workers = workers
        self._writer = writer
        self._checkpoints = len(job.trajectory)
        self._steps = job.settings.steps
        self._drops_cached = job.drops_cached

    def unfinished(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Write the batches that the journal has, and yield the others."""
        for batch in batches:
            self._job.ranks.check()
            if not self.write_finished(batch):
                yield batch

    def write_finished(self, batch: Batch) -> bool:
        """Write a batch if the journal has it, and say whether it has."""
        journal = self._job.journal
        finished = journal and journal.finished(
            self._journal_bytes(batch), partial(can_be_of, batch)
        )
        if finished:
            self._delivery.write_finished(batch, finished)
        return bool(finished)

    def _journal_bytes(self, batch: Batch) -> int:
        rows = sum(s.count * torch_dtype(s.tensor.dtype).itemsize for s in batch.segments)
        return rows * len(self._job.outputs)

    def predict_batches(self, batches: Iterator[Batch]) -> None:
        """While one batch is computed, the next is read, and with three the one before written."""
        rows, pinned = self._job.plan.batch_rows, self._job.predictors.pinned
        count = batches_in_memory(self._job.settings.threads)
        free = [Buffer.new(self._checkpoints, self._steps, rows, pinned) for _ in range(count)]
        written = deque[Future[None]]()
        pending = self._start_reading(batches, free[0])
        turn = 0
        while pending is not None:
            batch = pending.result()
            buffer, turn = free[turn], (turn + 1) % count
            if len(written) == count - 1:  # what was in the next buffer must be out of it
                written.popleft().result()
            pending = self._start_reading(batches, free[turn])
            self._compute(batch, buffer)
            if self._writer is None:
                self._delivery.write(batch, buffer)
            else:
                written.append(self._writer.submit(self._delivery.write, batch, buffer))
        while written:
            written.popleft().result()

    def predict_read(self, batch: Batch, buffer: Buffer) -> None:
        """Predict a batch that has been read, and write it."""
        self._compute(batch, buffer)
        self._delivery.write(batch, buffer)

    def _compute(self, batch: Batch, buffer: Buffer) -> None:
        with self._delivery.report.timed("computing"):
            if isinstance(self._job.predictors.rows, DevicePredictor):
                self._compute_on_devices(batch, buffer, self._job.predictors.rows)
            else:
                self._compute_in_threads(batch, buffer, self._job.predictors.rows)

    def predict_wholes(self) -> None:
        """Predict the tensors that the method needs whole, group after group."""
        predictor = self._job.predictors.tensors
        if predictor is not None:
            for batch in self.unfinished(self._job.plan.whole_tensors()):
                self._predict_whole(batch, predictor)

    def _predict_whole(self, batch: Batch, predictor: TensorPredictor) -> None:
        """One group of tensors, read whole; nothing else is in memory meanwhile.

        One worker computes it with one thread, as it does a block: the result of a matrix
        decomposition also depends on how many threads share it.
        """
        size = self._checkpoints
        group = tuple(segment.tensor for segment in batch.segments)
        buffer = Buffer.new(size, self._steps, batch.rows)
        self.read(batch, buffer)
        window, out = buffer.history[:size], buffer.history[size:]
        if len(group) > 1 and buffer.copied.any():
            # A value of Θ0's would not fit the others, which are predicted together.
            buffer.copied.fill_(True)
            out.zero_()
            self._delivery.write(batch, buffer)
            return
        with self._delivery.report.timed("computing"):
            truncation = self._workers.submit(predictor.predict, group, window, out).result()
            for step in range(self._steps):
                for start, count in chunks(0, batch.rows):
                    buffer.keep_finite(size, step, slice(start, start + count))
        self._delivery.write(batch, buffer, truncation)

    def _start_reading(self, batches: Iterator[Batch], buffer: Buffer) -> Future[Batch] | None:
        batch = next(batches, None)
        return None if batch is None else self._reader.submit(self.read, batch, buffer)

    def read(self, batch: Batch, buffer: Buffer) -> Batch:
        """Read the windows of a batch, and mark the rows that are copied.

        Args:
            batch: what to read.
            buffer: receives the window; its predictions stay as they are.

        Raises:
            CheckpointError: an input cannot be read, or has values that are not finite.
        """
        trajectory, size = self._job.trajectory, self._checkpoints
        with self._delivery.report.timed("reading"):
            buffer.copied.zero_()
            buffer.replaced.zero_()
            finite = True
            for segment in batch.segments:
                entries, rows = trajectory.entries(segment.tensor.name), segment.rows
                for k, checkpoint in enumerate(trajectory.checkpoints):
                    out = buffer.history[size - 1 - k, rows]
                    finite &= read_float32(checkpoint, entries[k], segment.start, out)
                    if self._drops_cached:
                        nbytes = torch_dtype(entries[k].dtype).itemsize
                        checkpoint.drop_cached(
                            entries[k], segment.start * nbytes, segment.count * nbytes
                        )
            if not finite:
                self._mark_nonfinite(batch, buffer)
        return batch

    def _mark_nonfinite(self, batch: Batch, buffer: Buffer) -> None:
        """Refuse values that are not finite, or mark and blank out their rows."""
        # In chunks, since the check makes copies; not tensor by tensor, which may be tiny.
        for row, count in chunks(0, batch.rows):
            history = buffer.history[: self._checkpoints, row : row + count]
            if not all_finite(history):
                finite = torch.isfinite(history)
                self._refuse_nonfinite(batch, row, finite)
                copied = buffer.copied[row : row + count]
                copied.copy_(~finite.all(dim=0))
                history.masked_fill_(copied, 0.0)

    def _refuse_nonfinite(self, batch: Batch, row: int, finite: Tensor) -> None:
        """Name the first tensor with such values in the rows from ``row`` on, and its file."""
        if self._job.settings.allow_nonfinite:
            return
        first = row + int(torch.nonzero(~finite.all(dim=0))[0])
        segment = next(s for s in batch.segments if first < s.row + s.count)
        its = finite[:, max(segment.row - row, 0) : segment.row + segment.count - row]
        k = self._checkpoints - 1 - int(torch.nonzero(~its.all(dim=1))[-1])
        entry = self._job.trajectory.entries(segment.tensor.name)[k]
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r}: has values that are not finite in float32; "
            "--allow-nonfinite copies those from the first checkpoint"
        )

    def _compute_on_devices(self, batch: Batch, buffer: Buffer, predictor: DevicePredictor) -> None:
        with closing(predictor.predict(batch, buffer.history[:, : batch.rows])) as blocks:
            for rows in blocks:
                for step in range(self._steps):
                    buffer.keep_finite(self._checkpoints, step, rows)

    def _compute_in_threads(self, batch: Batch, buffer: Buffer, predictor: Predictor) -> None:
        starts = range(0, batch.rows, predictor.block_rows)
        group = max(1, -(-len(starts) // (self._job.settings.threads * _GROUPS_PER_THREAD)))
        waiting = [
            self._workers.submit(
                self._compute_blocks, batch, buffer, predictor, starts[i : i + group]
            )
            for i in range(0, len(starts), group)
        ]
        for job in waiting:
            job.result()

    def _compute_blocks(
        self, batch: Batch, buffer: Buffer, predictor: Predictor, starts: range
    ) -> None:
        size, end = self._checkpoints, min(starts.stop, batch.rows)
        count = self._job.predictors.rows_at_once or predictor.block_rows
        for start in range(starts.start, end, count):
            rows = slice(start, min(start + count, end))
            history, block = buffer.history[:, rows], batch.block(rows)
            for step in range(self._steps):
                predictor.predict(block, step + 1, history[: size + step], history[size + step])
                buffer.keep_finite(size, step, rows)
