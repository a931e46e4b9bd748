"""Batches through a method: each worker reads, computes and writes one after the other.

A batch is small enough to stay in the processor's cache from its bytes in the inputs to those in
the outputs, and no thread waits for another, but where something is to be done in the order of the
plan: what was written is taken into account batch after batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Lock

import torch
from torch import Tensor

from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.checkpoints.reading import as_bytes, chunks, read_float32
from know_cli.engine.batches import Buffer, adjacent
from know_cli.engine.delivery import Delivery
from know_cli.engine.job import Job
from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.plan import Batch
from know_cli.engine.planning import workers_of
from know_cli.engine.predictor import Predictor, TensorPredictor
from know_cli.engine.written import can_be_of
from know_cli.errors import CheckpointError
from know_cli.passes.numbers import all_finite


def predict(job: Job, delivery: Delivery) -> None:
    """All batches of a job's plan, then the tensors that are needed whole.

    Raises:
        CheckpointError: an input cannot be read, or it or a prediction of it has values that are
            not finite.
        OutputError: an output cannot be written.
        PeerError: another rank has failed.
    """
    with open_workers(workers_of(job.settings, job.predictors)) as workers:
        pipeline = Pipeline(job, delivery, workers)
        for batch in pipeline.unfinished(job.plan.batches()):
            pipeline.start(batch)
        pipeline.wait()
        pipeline.drop_buffers()  # a group has the memory for itself
        pipeline.predict_wholes()


@contextmanager
def open_workers(threads: int, name: str = "predict") -> Iterator[ThreadPoolExecutor]:
    """Threads, of which each computes with itself alone; after an error none begins any more."""
    # One thread a block: the pool is the parallelism, and a result must not depend on how many
    # threads share a matrix product.
    pool = ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        # What a batch waits for was begun before it, so that it is none of those given up.
        pool.shutdown(cancel_futures=True)


class Pipeline:
    """The threads of one job, and the batches that are in memory.

    Args:
        job: that is executed.
        delivery: of the same job.
        workers: take each batch from its bytes in the inputs to those in the outputs.
    """

    def __init__(self, job: Job, delivery: Delivery, workers: ThreadPoolExecutor) -> None:
        self._job = job
        self._delivery = delivery
        self._workers = workers
        self._checkpoints = len(job.trajectory)
        self._steps = job.settings.steps
        self._drops_cached = job.drops_cached
        self._count = workers_of(job.settings, job.predictors)
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(self._count):
            self._free.put(
                Buffer.new(
                    self._checkpoints,
                    self._steps,
                    job.plan.batch_rows,
                    on_devices=job.predictors.on_devices,
                    pinned=job.predictors.pinned,
                )
            )
        self._started = deque[Future[None]]()
        self._last: Future[None] | None = None
        # Of devices: one batch at a time, while others are read and written.
        self._devices = Lock()

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

    # ------------------------------------------------------------------ batches in workers

    def start(self, batch: Batch, buffer: Buffer | None = None) -> None:
        """Have a worker predict a batch and write it; wait where all have more than enough to do.

        Args:
            batch: which one; in the order of the plan.
            buffer: with its window, from :meth:`take_buffer`; None where the worker is to read.

        Raises:
            KnowError: of a batch that was started before; see :func:`predict`.
        """
        while self._started and (self._started[0].done() or len(self._started) > self._count):
            self._started.popleft().result()
        self._last = self._workers.submit(self._run, batch, buffer, self._last)
        self._started.append(self._last)

    def take_buffer(self) -> Buffer:
        """Room for a batch, when there is some.

        Raises:
            KnowError: of a batch that was started before; see :func:`predict`.
        """
        while self._started and self._started[0].done():
            self._started.popleft().result()
        return self._free.get()

    def wait(self) -> None:
        """Return when all that was started is written.

        Raises:
            KnowError: of the first batch with an error; see :func:`predict`.
        """
        while self._started:
            self._started.popleft().result()

    def drop_buffers(self) -> None:
        """Let go of the batches' memory; nothing more can be started."""
        while not self._free.empty():
            self._free.get()

    def _run(self, batch: Batch, filled: Buffer | None, previous: Future[None] | None) -> None:
        buffer = filled or self._free.get()
        try:
            if filled is None:
                self.read(batch, buffer)
            self._compute(batch, buffer)
            written = self._delivery.write(batch, buffer)
            if previous is not None:
                previous.result()  # was started before, so it is done or at work
            self._delivery.account(written)
        finally:
            self._free.put(buffer)

    def _compute(self, batch: Batch, buffer: Buffer) -> None:
        predictor = self._job.predictors.rows
        if isinstance(predictor, DevicePredictor):
            with self._devices, self._delivery.report.timed("computing"):
                self._compute_on_devices(batch, buffer, predictor)
        else:
            with self._delivery.report.timed("computing"):
                self._compute_blocks(batch, buffer, predictor)

    def _compute_on_devices(self, batch: Batch, buffer: Buffer, predictor: DevicePredictor) -> None:
        size, history = self._checkpoints, buffer.history[:, : batch.rows]
        stored = buffer.as_stored()
        if stored is not None:
            stored, finite = stored[:, : batch.rows], True
            with closing(predictor.predict(batch, stored)) as blocks:
                for rows in blocks:
                    history[size:, rows] = stored[size:, rows].float()
                    finite &= all(all_finite(out[rows]) for out in history[size:])
            if finite:
                return
            # Whether float32 would have held what is not finite, only float32 can tell.
        with closing(predictor.predict(batch, history)) as blocks:
            for rows in blocks:
                for step in range(self._steps):
                    buffer.keep_finite(size, step, rows)

    def _compute_blocks(self, batch: Batch, buffer: Buffer, predictor: Predictor) -> None:
        size = self._checkpoints
        count = self._job.predictors.rows_at_once or predictor.block_rows
        for start in range(0, batch.rows, count):
            rows = slice(start, min(start + count, batch.rows))
            history, block = buffer.history[:, rows], batch.block(rows)
            for step in range(self._steps):
                predictor.predict(block, step + 1, history[: size + step], history[size + step])
                buffer.keep_finite(size, step, rows)

    # ------------------------------------------------------------------ tensors that are whole

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
        truncation = None
        if len(group) > 1 and buffer.is_marked:
            # A value of Θ0's would not fit the others, which are predicted together.
            buffer.copied.fill_(True)
            out.zero_()
        else:
            with self._delivery.report.timed("computing"):
                truncation = self._workers.submit(predictor.predict, group, window, out).result()
                for step in range(self._steps):
                    for start, count in chunks(0, batch.rows):
                        buffer.keep_finite(size, step, slice(start, start + count))
        self._delivery.account(self._delivery.write(batch, buffer, truncation, is_next=True))

    # ------------------------------------------------------------------ reading

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
            buffer.clear()
            if buffer.halves is not None:
                buffer.stored = self._stored_in(batch)
            stored = buffer.as_stored()
            finite = True
            entries = [trajectory.entries(segment.tensor.name) for segment in batch.segments]
            for k, checkpoint in enumerate(trajectory.checkpoints):
                for run in adjacent(batch.segments, [of_all[k] for of_all in entries]):
                    out = buffer.history[size - 1 - k, run.rows]
                    if stored is None:
                        finite &= read_float32(checkpoint, run.entry, run.start, out)
                    else:
                        halves = stored[size - 1 - k, run.rows]
                        checkpoint.read_into(run.entry, 2 * run.start, as_bytes(halves))
                        finite &= all_finite(out.copy_(halves))
                    if self._drops_cached:
                        nbytes = torch_dtype(run.entry.dtype).itemsize
                        checkpoint.drop_cached(run.entry, run.start * nbytes, len(out) * nbytes)
            if not finite:
                self._mark_nonfinite(batch, buffer)
        return batch

    def _stored_in(self, batch: Batch) -> torch.dtype | None:
        """The type of 16 bits that all of a batch has in all checkpoints; None for others."""
        names = {segment.tensor.name for segment in batch.segments}
        found = {entry.dtype for name in names for entry in self._job.trajectory.entries(name)}
        dtype = torch_dtype(found.pop())
        return dtype if not found and dtype.itemsize == 2 else None

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
                buffer.is_marked = True
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
