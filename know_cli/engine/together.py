"""Several jobs on the same inputs, executed in one pass over them.

The parameters of one kind that any of the jobs predicts are read once, converted and checked, as
one long stream. Each job takes the rows that are its own from it into a batch of its own, whose
blocks and sums lie where they would if it were executed alone, so that its bytes are the same.

Tensors that a method needs whole are read for each such method, and so are float64 values, which
are read a second time anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from know_cli.checkpoints import Sink
from know_cli.engine.batches import Buffer
from know_cli.engine.delivery import Delivery
from know_cli.engine.job import Job
from know_cli.engine.pipeline import Pipeline, open_workers
from know_cli.engine.plan import Batch, Copy, PlannedTensor, Stream
from know_cli.engine.planning import workers_of
from know_cli.engine.report import Report, peak_resident
from know_cli.engine.run import commit, execute, finish, open_sinks, tell_of_other_files
from know_cli.errors import KnowError
from know_cli.kinds import PREDICTED_KINDS


def execute_together(jobs: Sequence[Job]) -> list[Report]:
    """Execute jobs in one pass, and write every output of all of them whole, or none.

    Args:
        jobs: at least one, of the same trajectory, progress and ranks (one process) and with the
            same threads and ``allow_nonfinite``; each planned beside the others.

    Returns:
        A report of each. Reading is counted in the first; the total is that of all.

    Raises:
        CheckpointError: an input cannot be read, or it or a prediction of it has values that are
            not finite.
        OutputError: an output cannot be written.
    """
    if len(jobs) == 1:
        return [execute(jobs[0])]
    began = time.perf_counter()
    progress, trajectory = jobs[0].progress, jobs[0].trajectory
    with ExitStack() as stack:
        sinks = [open_sinks(job, stack) for job in jobs]
        deliveries = [
            Delivery.of(job, of_job, Report.of(job.plan.tensors))
            for job, of_job in zip(jobs, sinks, strict=True)
        ]
        for job in jobs:
            if job.journal is not None:
                job.notices.add(*job.journal.notices)
        progress.phase("predicting", sum(job.plan.predicted for job in jobs))
        _predict(deliveries)
        progress.phase("copying")
        _copy(deliveries)
        for delivery in deliveries:
            finish(delivery)
        trajectory.check_unchanged()
        progress.phase("flushing to disk")
        with deliveries[0].report.timed("writing"):
            # All are on disk before the first is seen.
            for sink in (sink for of_job in sinks for sink in of_job):
                sink.flush()
            commit([sink for of_job in sinks for sink in of_job])
        for delivery, of_job in zip(deliveries, sinks, strict=True):
            _close(delivery, of_job)
    reports = [delivery.report for delivery in deliveries]
    for report in reports:
        report.peak_memory = peak_resident()
        report.seconds["total"] = time.perf_counter() - began
    return reports


def _close(delivery: Delivery, sinks: Sequence[Sink]) -> None:
    job, report = delivery.job, delivery.report
    if job.journal is not None:
        job.journal.remove()
    report.outputs = [(output.path, output.step) for output in job.outputs]
    report.bytes_written = sum(sink.file_bytes for sink in sinks)
    tell_of_other_files(job.notices, sinks)


# ------------------------------------------------------------------ what is predicted


@dataclass
class _Taker:
    """One job's part of what is read: its batches, filled one after the other.

    Attributes:
        pipeline: predicts a batch once it is full.
        batches: that are still to come.
        names: of the tensors that the job predicts row by row.
        buffer: of the batch at hand; None where nothing is to be taken.
        batch: the one at hand; None after the last.
        filled: how many of its rows have been taken.
    """

    pipeline: Pipeline
    batches: Iterator[Batch]
    names: frozenset[str]
    buffer: Buffer | None = None
    batch: Batch | None = None
    filled: int = 0

    @staticmethod
    def of(job: Job, pipeline: Pipeline) -> _Taker:
        taker = _Taker(
            pipeline,
            job.plan.batches(),
            frozenset(t.name for stream in job.plan.streams for t in stream.tensors),
        )
        taker._begin()
        return taker

    def _begin(self) -> None:
        self.batch, self.filled, self.buffer = next(self.batches, None), 0, None
        # What the journal has only goes by.
        if self.batch is not None and not self.pipeline.write_finished(self.batch):
            self.buffer = self.pipeline.take_buffer()
            self.buffer.clear()

    def take(self, window: Buffer, rows: slice) -> None:
        """Take rows of a window, and predict each batch that they fill."""
        size = len(window.history)
        begin = rows.start
        while begin < rows.stop:
            assert self.batch is not None
            count = min(rows.stop - begin, self.batch.rows - self.filled)
            if self.buffer is not None:
                own = slice(self.filled, self.filled + count)
                taken = slice(begin, begin + count)
                self.buffer.history[:size, own] = window.history[:, taken]
                if window.is_marked:
                    self.buffer.copied[own] = window.copied[taken]
                    self.buffer.is_marked = True
            begin, self.filled = begin + count, self.filled + count
            if self.filled == self.batch.rows:
                if self.buffer is not None:
                    self.pipeline.start(self.batch, self.buffer)
                self._begin()


def _predict(deliveries: Sequence[Delivery]) -> None:
    """All batches of all jobs, window after window, then what each needs whole."""
    jobs = [delivery.job for delivery in deliveries]
    threads = max(workers_of(job.settings, job.predictors) for job in jobs)
    with open_workers(threads) as workers, open_workers(1, "read") as reader:
        pipelines = [Pipeline(delivery.job, delivery, workers) for delivery in deliveries]
        try:
            _predict_windows(jobs, pipelines, reader)
        except KnowError:
            for pipeline in pipelines:
                pipeline.wait()  # what is wrong before it is told first, job after job
            raise
        for pipeline in pipelines:
            pipeline.wait()
        for pipeline in pipelines:
            pipeline.drop_buffers()  # a group has the memory for itself
        for pipeline in pipelines:
            pipeline.predict_wholes()


def _predict_windows(
    jobs: Sequence[Job], pipelines: Sequence[Pipeline], reader: ThreadPoolExecutor
) -> None:
    """Read all that any job predicts row by row, and start each batch as soon as it is full."""
    takers = [_Taker.of(job, one) for job, one in zip(jobs, pipelines, strict=True)]
    # Two windows take no more than the spare batch of each of two jobs, which is what the plans
    # count.
    rows = min(job.plan.batch_rows for job in jobs)
    free = [Buffer.new(len(jobs[0].trajectory), 0, rows) for _ in range(2)]
    windows = (batch for stream in _union(jobs) for batch in stream.batches(rows))
    turn, batch = 0, next(windows, None)
    pending = None if batch is None else reader.submit(pipelines[0].read, batch, free[0])
    while pending is not None:
        read, window, turn = pending.result(), free[turn], 1 - turn
        batch = next(windows, None)
        pending = None
        if batch is not None:
            pending = reader.submit(pipelines[0].read, batch, free[turn])
        for taker in takers:
            for run in _runs(read, taker.names):
                taker.take(window, run)


def _union(jobs: Sequence[Job]) -> Iterator[Stream]:
    """The parameters of each kind that any job predicts row by row, in the order of Θ0's files."""
    for kind in PREDICTED_KINDS:
        tensors: dict[str, PlannedTensor] = {}
        for job in jobs:
            for stream in job.plan.streams:
                if stream.kind is kind:
                    tensors |= {tensor.name: tensor for tensor in stream.tensors}
        names = (name for name in jobs[0].trajectory.first.tensors if name in tensors)
        yield Stream.of(kind, tuple(tensors[name] for name in names))


def _runs(batch: Batch, names: frozenset[str]) -> Iterator[slice]:
    """Rows of a batch that lie together and are of tensors with these names."""
    begin = end = 0
    for segment in batch.segments:
        if segment.tensor.name in names:
            if segment.row != end:
                if end > begin:
                    yield slice(begin, end)
                begin = segment.row
            end = segment.row + segment.count
    if end > begin:
        yield slice(begin, end)


# ------------------------------------------------------------------ what is not


def _copy(deliveries: Sequence[Delivery]) -> None:
    """Copy each tensor to the outputs of all jobs that copy it, reading it once."""
    wanted: dict[str, list[tuple[Delivery, Copy]]] = {}
    for delivery in deliveries:
        for copy in delivery.job.plan.copies:
            wanted.setdefault(copy.tensor.name, []).append((delivery, copy))
    for found in wanted.values():
        first, copy = found[0]
        first.copy_to(copy, [sink for delivery, _ in found for _, sink in delivery.outputs])
