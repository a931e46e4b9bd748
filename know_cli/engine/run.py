"""Executes a plan: reads ahead, computes in worker threads, writes as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints import (
    Checkpoint,
    CheckpointPart,
    CheckpointWriter,
    SharedPlace,
    Sink,
    TensorEntry,
    Trajectory,
)
from know_cli.checkpoints.dtypes import is_float, torch_dtype
from know_cli.engine.buffer import Buffer
from know_cli.engine.journal import Finished, Journal
from know_cli.engine.lanes import DevicePredictor
from know_cli.engine.memory import peak_resident
from know_cli.engine.plan import CHUNK_ROWS, Action, Batch, Copy, Plan, PlannedTensor, Settings
from know_cli.engine.predictor import Predictor, Predictors, TensorPredictor
from know_cli.engine.progress import Progress
from know_cli.engine.ranks import PeerError, Ranks
from know_cli.engine.reading import as_bytes, chunks, read_elements, read_float32
from know_cli.engine.report import Report
from know_cli.engine.rescale import ChannelSums
from know_cli.engine.sharing import share
from know_cli.engine.stretches import Stretch, cut_stretches, write_pieces
from know_cli.errors import CheckpointError
from know_cli.kinds import Kind
from know_cli.normalisation import NormLayer

_COPY_BYTES = 1 << 20
# Blocks are handed to workers in groups: small enough that all finish together, large enough
# that handing them out costs nothing.
_GROUPS_PER_THREAD = 4


@dataclass(frozen=True)
class OutputStep:
    """A checkpoint to write: after which step, where, and with which metadata.

    ``force`` allows what has come to be at ``path`` to be replaced.
    """

    step: int
    path: Path
    metadata: Mapping[str, str]
    force: bool = True


def execute(
    trajectory: Trajectory,
    plan: Plan,
    settings: Settings,
    predictors: Predictors,
    outputs: Sequence[OutputStep],
    progress: Progress,
    journal: Journal | None = None,
    open_sink: Callable[[OutputStep], Sink] | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Predict, and write every output whole or not at all.

    All outputs are on disk before the first gets its name. Only if a renaming fails after that
    of an earlier step has that step's output, which is whole, been written alone.

    Several ranks call this with the same inputs and wishes; each writes its part, and has it on
    disk before rank 0 writes what needs the parts of all, and gives the outputs their names.

    Args:
        trajectory: the inputs.
        plan: made for these inputs and settings.
        settings: what the user wants.
        predictors: the method.
        outputs: in ascending order of step; the last is the one that the report is about.
        progress: is told of phases and parameters.
        journal: of batches that an earlier run has finished, and for those of this one.
        open_sink: where each output goes; None is into a new checkpoint.
        ranks: that share the work, of which this process is one; None is this process alone.

    Returns:
        The numbers of the run; on other ranks than 0 only of their part.

    Raises:
        CheckpointError: an input cannot be read, or has values that are not finite.
        OutputError: an output cannot be written.
        PeerError: another rank has failed.
    """
    began = time.perf_counter()
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        if open_sink is None:
            writers = _open_outputs(stack, trajectory.first, outputs, ranks)
        else:
            writers = [stack.enter_context(open_sink(output)) for output in outputs]
        plan = share(plan, ranks, predictors.rows.block_rows)
        run = _Run(
            trajectory, plan, settings, predictors, outputs, writers, progress, journal, ranks
        )
        if journal is not None:
            run.report.notices += journal.notices
        whose = f" as rank {ranks.rank} of {ranks.size}:" if ranks.size > 1 else ""
        progress.phase(f"predicting{whose}", plan.predicted)
        run.predict(stack)
        progress.phase("copying")
        run.copy()
        if ranks.rank:
            run.hand_over()
        else:
            run.take_over()
            run.reset()
            run.rescale()
            trajectory.check_unchanged()
            if open_sink is None:
                progress.phase("flushing to disk")
            with run.timed("writing"):
                # All are on disk before the first is seen, so that hardly anything can come
                # between.
                for writer in writers:
                    writer.flush()
                for writer in writers:
                    writer.commit()
            with suppress(PeerError):  # the output is complete, whatever becomes of the others
                ranks.broadcast(None)
        if journal is not None:
            journal.remove()
        report = run.report
        report.outputs = [(output.path, output.step) for output in outputs]
        report.bytes_written = sum(writer.nbytes for writer in writers)
        report.notices += [
            f"{path}: left out, it is not part of the predicted weights"
            for path in writers[0].left_out
        ]
        report.notices += [
            f"{path}: was there before and stays, beside the predicted weights"
            for writer in writers
            for path in writer.remaining
        ]
    report.peak_memory = peak_resident()
    report.seconds["total"] = time.perf_counter() - began
    return report


def _open_outputs(
    stack: ExitStack, like: Checkpoint, outputs: Sequence[OutputStep], ranks: Ranks
) -> list[Sink]:
    """Rank 0 begins the files, and all ranks open them."""
    if ranks.rank:
        places = [SharedPlace(Path(path), *rest) for path, *rest in ranks.broadcast(None)]
        parts = [
            stack.enter_context(
                CheckpointPart(output.path, like, output.metadata, place, ranks.check)
            )
            for output, place in zip(outputs, places, strict=True)
        ]
        ranks.gather(None)
        ranks.broadcast(None)
        return list(parts)
    writers = [
        stack.enter_context(
            CheckpointWriter(output.path, like, output.metadata, force=output.force)
        )
        for output in outputs
    ]
    if ranks.size > 1:
        places = [writer.share() for writer in writers]
        ranks.broadcast([(str(place.path), place.is_locked, place.stamp) for place in places])
        # Only now does each rank know that what it has opened and locked is this run's: rank 0
        # was there all the time.
        ranks.gather(None)
        ranks.broadcast(None)
    return list(writers)


class _Run:
    """The state of one execution."""

    def __init__(
        self,
        trajectory: Trajectory,
        plan: Plan,
        settings: Settings,
        predictors: Predictors,
        outputs: Sequence[OutputStep],
        writers: Sequence[Sink],
        progress: Progress,
        journal: Journal | None,
        ranks: Ranks,
    ) -> None:
        self.trajectory = trajectory
        self.ranks = ranks
        self.journal = journal
        self.plan = plan
        self.settings = settings
        self.predictors = predictors
        self.outputs = list(zip((output.step for output in outputs), writers, strict=True))
        self.progress = progress
        self.report = Report()
        # The page cache, too, shall not hold more for this run than it may take itself.
        inputs = sum(checkpoint.nbytes for checkpoint in trajectory.checkpoints)
        self.forgets = inputs > settings.max_memory
        grid = math.gcd(CHUNK_ROWS, predictors.rows.block_rows)
        self.layers = list(
            {t.layer.prefix: t.layer for t in plan.with_action(Action.RESCALE) if t.layer}.values()
        )
        shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
        # What rescaling needs to know of the weights and biases that stream by, a step.
        self.sums: dict[tuple[int, str], ChannelSums] = {}
        self.biases: dict[tuple[int, str], np.ndarray] = {}
        # Values that are not finite in copied tensors of which this rank has a part.
        self.copied_nonfinite: dict[str, int] = {}
        for layer in self.layers:
            weight, bias = layer.source_weight, layer.source_bias
            for step, _ in self.outputs:
                if weight is not None:
                    channels, *rest = shapes[weight]
                    self.sums[step, weight] = ChannelSums(channels, math.prod(rest), grid)
                if bias is not None:
                    self.biases[step, bias] = self._values(bias)
        self._count_kinds()

    def _count_kinds(self) -> None:
        for tensor in self.plan.tensors:
            numbers = self.report.kinds[tensor.kind]
            numbers.tensors += 1
            numbers.parameters += tensor.elements
            if tensor.action is Action.PREDICT:
                numbers.predicted += tensor.elements
            else:
                key = f"{tensor.action.value}: {tensor.reason}"
                self.report.reasons[key] = self.report.reasons.get(key, 0) + 1

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[what] += time.perf_counter() - began

    # ------------------------------------------------------------------ predicting

    def predict(self, stack: ExitStack) -> None:
        """All batches, then the tensors that are needed whole."""
        # One thread a block: the pools are the parallelism, and a result must not depend on how
        # many threads share a matrix product.
        reader, workers = (
            stack.enter_context(
                ThreadPoolExecutor(threads, name, initializer=torch.set_num_threads, initargs=(1,))
            )
            for threads, name in ((1, "read"), (self.settings.threads, "predict"))
        )
        self._predict_batches(self._unfinished(self.plan.batches()), reader, workers)
        if self.predictors.tensors is not None:
            for batch in self._unfinished(self.plan.whole_tensors()):
                self._predict_whole(batch, self.predictors.tensors, workers)

    def _unfinished(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Write the batches that the journal has, and yield the others."""
        for batch in batches:
            self.ranks.check()
            finished = self.journal and self.journal.finished(self._journal_bytes(batch))
            if finished:
                self._write_finished(batch, finished)
            else:
                yield batch

    def _journal_bytes(self, batch: Batch) -> int:
        rows = sum(s.count * torch_dtype(s.tensor.dtype).itemsize for s in batch.segments)
        return rows * len(self.outputs)

    def _predict_batches(
        self, batches: Iterator[Batch], reader: ThreadPoolExecutor, workers: ThreadPoolExecutor
    ) -> None:
        """While one batch is computed, the next is read."""
        size, rows = len(self.trajectory), self.plan.batch_rows
        pinned = self.predictors.pinned
        free = [Buffer.new(size, self.settings.steps, rows, pinned) for _ in range(2)]
        pending = self._start_reading(reader, batches, free[0])
        turn = 0
        while pending is not None:
            batch = pending.result()
            buffer, turn = free[turn], 1 - turn
            pending = self._start_reading(reader, batches, free[turn])
            with self.timed("computing"):
                self._compute(batch, buffer, workers)
            self._write(batch, buffer)

    def _predict_whole(
        self, batch: Batch, predictor: TensorPredictor, workers: ThreadPoolExecutor
    ) -> None:
        """One tensor, read whole; nothing else is in memory meanwhile.

        One worker computes it with one thread, as it does a block: the result of a matrix
        decomposition, too, depends on how many threads share it.
        """
        size = len(self.trajectory)
        (segment,) = batch.segments
        buffer = Buffer.new(size, self.settings.steps, batch.rows)
        self._read(batch, buffer)
        window, out = buffer.history[:size], buffer.history[size:]
        with self.timed("computing"):
            workers.submit(
                predictor.predict, batch.kind, segment.tensor.shape, window, out
            ).result()
            for step in range(self.settings.steps):
                for start, count in chunks(0, batch.rows):
                    buffer.keep_finite(size, step, slice(start, start + count))
        self._write(batch, buffer)

    def _write(self, batch: Batch, buffer: Buffer) -> None:
        replaced = sum(self._write_stretch(stretch, buffer) for stretch in cut_stretches(batch))
        copied = buffer.copied[: batch.rows]
        self.report.replaced += replaced
        self.report.nonfinite += int(copied.sum())
        if self.journal is not None:
            rows = torch.nonzero(copied).flatten().tolist()
            self.journal.finish({"replaced": replaced, "copied": rows})
        self.progress.advance(batch.rows)

    def _write_finished(self, batch: Batch, finished: Finished) -> None:
        """Write what the journal has, and take from it what :meth:`_write_stretch` would."""
        assert self.journal is not None
        position, first = finished.position, self.trajectory.first
        copied = torch.zeros(batch.rows, dtype=torch.bool)
        copied[torch.tensor(finished.facts["copied"], dtype=torch.int64)] = True
        for stretch in cut_stretches(batch):
            before = torch.empty(stretch.count)
            for piece in stretch.pieces:
                entry = first.tensors[piece.tensor.name]
                read_float32(first, entry, piece.start, before[piece.rows])
            for step, writer in self.outputs:
                values = torch.empty(stretch.count, dtype=torch_dtype(stretch.dtype))
                self.journal.read(position, as_bytes(values))
                position += values.nbytes
                write_pieces(writer, stretch, values)
                last = writer is self.outputs[-1][1]
                self._observe(step, stretch, before, values, copied[stretch.rows], last=last)
        self.report.replaced += finished.facts["replaced"]
        self.report.nonfinite += len(finished.facts["copied"])
        self.progress.advance(batch.rows)

    def _start_reading(
        self, reader: ThreadPoolExecutor, batches: Iterator[Batch], buffer: Buffer
    ) -> Future[Batch] | None:
        batch = next(batches, None)
        return None if batch is None else reader.submit(self._read, batch, buffer)

    def _read(self, batch: Batch, buffer: Buffer) -> Batch:
        with self.timed("reading"):
            size = len(self.trajectory)
            buffer.copied.zero_()
            buffer.replaced.zero_()
            for segment in batch.segments:
                rows = slice(segment.row, segment.row + segment.count)
                entries = self.trajectory.entries(segment.tensor.name)
                for k, checkpoint in enumerate(self.trajectory.checkpoints):
                    out = buffer.history[size - 1 - k, rows]
                    read_float32(checkpoint, entries[k], segment.start, out)
                    self._forget(checkpoint, entries[k], segment.start, segment.count)
            # In chunks, since the check makes copies; not tensor by tensor, which may be tiny.
            for row, count in chunks(0, batch.rows):
                history = buffer.history[:size, row : row + count]
                finite = torch.isfinite(history)
                if not finite.all():
                    self._refuse_nonfinite(batch, row, finite)
                    copied = buffer.copied[row : row + count]
                    copied.copy_(~finite.all(dim=0))
                    history.masked_fill_(copied, 0.0)
        return batch

    def _forget(self, checkpoint: Checkpoint, entry: TensorEntry, start: int, count: int) -> None:
        if self.forgets:
            size = torch_dtype(entry.dtype).itemsize
            checkpoint.forget(entry, start * size, count * size)

    def _refuse_nonfinite(self, batch: Batch, row: int, finite: Tensor) -> None:
        """Name the first tensor with such values in the rows from ``row`` on, and its file."""
        if self.settings.allow_nonfinite:
            return
        first = row + int(torch.nonzero(~finite.all(dim=0))[0])
        segment = next(s for s in batch.segments if first < s.row + s.count)
        its = finite[:, max(segment.row - row, 0) : segment.row + segment.count - row]
        k = len(self.trajectory) - 1 - int(torch.nonzero(~its.all(dim=1))[-1])
        entry = self.trajectory.entries(segment.tensor.name)[k]
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r}: has values that are not finite in float32; "
            "--allow-nonfinite copies those from the first checkpoint"
        )

    def _compute(self, batch: Batch, buffer: Buffer, workers: ThreadPoolExecutor) -> None:
        rows = self.predictors.rows
        if isinstance(rows, DevicePredictor):
            self._compute_on_devices(batch, buffer, rows)
        else:
            self._compute_in_threads(batch, buffer, rows, workers)

    def _compute_on_devices(self, batch: Batch, buffer: Buffer, predictor: DevicePredictor) -> None:
        size = len(self.trajectory)
        with closing(predictor.predict(batch.kind, buffer.history[:, : batch.rows])) as blocks:
            for rows in blocks:
                for step in range(self.settings.steps):
                    buffer.keep_finite(size, step, rows)

    def _compute_in_threads(
        self, batch: Batch, buffer: Buffer, predictor: Predictor, workers: ThreadPoolExecutor
    ) -> None:
        block = predictor.block_rows
        starts = range(0, batch.rows, block)
        group = max(1, -(-len(starts) // (self.settings.threads * _GROUPS_PER_THREAD)))
        jobs = [
            workers.submit(self._compute_blocks, batch, buffer, predictor, starts[i : i + group])
            for i in range(0, len(starts), group)
        ]
        for job in jobs:
            job.result()

    def _compute_blocks(
        self, batch: Batch, buffer: Buffer, predictor: Predictor, starts: Iterable[int]
    ) -> None:
        size = len(self.trajectory)
        for start in starts:
            stop = min(start + predictor.block_rows, batch.rows)
            history = buffer.history[:, start:stop]
            for step in range(self.settings.steps):
                predictor.predict(
                    batch.kind, step + 1, history[: size + step], history[size + step]
                )
                buffer.keep_finite(size, step, slice(start, stop))

    def _write_stretch(self, stretch: Stretch, buffer: Buffer) -> int:
        """Write a stretch to every output.

        Returns:
            How many predictions were replaced by Θ0's values.
        """
        size, rows, replaced = len(self.trajectory), stretch.rows, 0
        before, copied = buffer.history[size - 1, rows], buffer.copied[rows]
        for step, writer in self.outputs:
            last = writer is self.outputs[-1][1]
            values, count = self._cast(
                stretch,
                buffer.history[size + step - 1, rows],
                copied,
                buffer.replaced[step - 1, rows],
            )
            replaced += count
            with self.timed("writing"):
                write_pieces(writer, stretch, values)
                if self.journal is not None:
                    self.journal.add(as_bytes(values))
            self._observe(step, stretch, before, values, copied, last=last)
        return replaced

    def _cast(
        self, stretch: Stretch, values: Tensor, copied: Tensor, replaced: Tensor
    ) -> tuple[Tensor, int]:
        """To the output's dtype, with Θ0's own values where there is no finite prediction.

        Returns:
            The values, and how many predictions were replaced.
        """
        cast = values.to(torch_dtype(stretch.dtype))
        replaced = (replaced | ~torch.isfinite(cast)) & ~copied
        taken = replaced | copied
        if not taken.any():
            return cast, 0
        first, original = self.trajectory.first, torch.empty_like(cast)
        for piece in stretch.pieces:
            entry = first.tensors[piece.tensor.name]
            original[piece.rows] = read_elements(first, entry, piece.start, piece.count)
        return torch.where(taken, original, cast), int(replaced.sum())

    def _observe(
        self,
        step: int,
        stretch: Stretch,
        before: Tensor,
        values: Tensor,
        copied: Tensor,
        *,
        last: bool,
    ) -> None:
        """Take from what was written whatever rescaling and the report need."""
        biases = [p for p in stretch.pieces if (step, p.tensor.name) in self.biases]
        weights = [p for p in stretch.pieces if (step, p.tensor.name) in self.sums]
        if not (last or biases or weights):
            return
        new = values.double()
        # A copied value has not changed; its history was blanked out before predicting.
        old = torch.where(copied, new, before.double())
        for piece in biases:
            bias = self.biases[step, piece.tensor.name]
            bias[piece.start : piece.start + piece.count] = new[piece.rows].numpy()
        if copied.any():
            old, new = (torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (old, new))
        for piece in weights:
            self.sums[step, piece.tensor.name].add(
                piece.start,
                stretch.rows.start + piece.rows.start,
                old[piece.rows].numpy(),
                new[piece.rows].numpy(),
            )
        if last:
            change = new - old
            numbers = self.report.kinds[stretch.kind]
            numbers.absolute_change += float(change.abs().sum())
            numbers.squared_change += float(change.square().sum())
            numbers.squared_norm += float(old.square().sum())

    # ------------------------------------------------------------------ the other tensors

    def copy(self) -> None:
        """Copy tensors byte by byte from Θ0."""
        for copy in self.plan.copies():
            nonfinite = self._copy(copy, [writer for _, writer in self.outputs])
            if copy.nbytes == copy.tensor.nbytes:
                self._judge_copied(copy.tensor, nonfinite)
            elif nonfinite:
                self.copied_nonfinite[copy.tensor.name] = nonfinite

    def _copy(self, copy: Copy, writers: Iterable[Sink]) -> int:
        """Copy, and count the values that are not finite."""
        tensor, nonfinite = copy.tensor, 0
        entry = self.trajectory.first.tensors[tensor.name]
        buffer = torch.empty(min(copy.nbytes, _COPY_BYTES), dtype=torch.uint8)
        for start, count in chunks(copy.start, copy.nbytes, _COPY_BYTES):
            self.ranks.check()
            data = buffer[:count]
            with self.timed("reading"):
                self.trajectory.first.read_into(entry, start, as_bytes(data))
            with self.timed("writing"):
                for writer in writers:
                    writer.write(tensor.name, start, as_bytes(data))
            if self.forgets:
                self.trajectory.first.forget(entry, start, count)
            if is_float(tensor.dtype):
                nonfinite += int((~torch.isfinite(data.view(torch_dtype(tensor.dtype)))).sum())
        return nonfinite

    def _judge_copied(self, tensor: PlannedTensor, nonfinite: int) -> None:
        """Say what is copied as it is, such as a mask of −inf."""
        entry = self.trajectory.first.tensors[tensor.name]
        if nonfinite:
            self.report.notices.append(
                f"{entry.path}: tensor {tensor.name!r} is copied with {nonfinite} values that "
                "are not finite"
            )

    # ------------------------------------------------------------------ between ranks

    def hand_over(self) -> None:
        """Have this rank's part on disk, tell rank 0 what is to be known of it, and wait for it."""
        self.trajectory.check_unchanged()
        with self.timed("writing"):
            for _, writer in self.outputs:
                writer.flush()
        report = self.report
        changes: list[tuple[int, str, list[int], list[float]]] = []
        for (step, name), values in self.biases.items():
            # Compared as bits: this rank's part is what is no longer Θ0's.
            at = np.flatnonzero(values.view(np.int64) != self._values(name).view(np.int64))
            if len(at):
                changes.append((step, name, at.tolist(), values[at].tolist()))
        self.ranks.gather(
            {
                "sums": [
                    (step, name, sums.sums.tolist(), sums.leading)
                    for (step, name), sums in self.sums.items()
                    if sums.is_begun
                ],
                "biases": changes,
                "copied_nonfinite": self.copied_nonfinite,
                "changes": {
                    kind.value: (n.absolute_change, n.squared_change, n.squared_norm)
                    for kind, n in report.kinds.items()
                },
                "replaced": report.replaced,
                "nonfinite": report.nonfinite,
                "seconds": report.seconds,
                "notices": report.notices,
            }
        )
        self.ranks.broadcast(None)  # now the output is complete

    def take_over(self) -> None:
        """Wait for the parts of all ranks, and join what is to be known of them."""
        if self.ranks.size == 1:
            return
        self.progress.phase("waiting for the other ranks")
        _, *parts = self.ranks.gather(None)
        for part in parts:
            self._join(part)
        for tensor in self.plan.with_action(Action.COPY):
            self._judge_copied(tensor, self.copied_nonfinite.get(tensor.name, 0))

    def _join(self, part: Mapping[str, Any]) -> None:
        """Take in the part of the next rank; the order of ranks is that of the weights."""
        for step, name, sums, leading in part["sums"]:
            self.sums[step, name].join(np.array(sums), leading)
        for step, name, at, values in part["biases"]:
            self.biases[step, name][at] = values
        for name, count in part["copied_nonfinite"].items():
            self.copied_nonfinite[name] = self.copied_nonfinite.get(name, 0) + count
        report = self.report
        for kind, (absolute, squared, norm) in part["changes"].items():
            numbers = report.kinds[Kind(kind)]
            numbers.absolute_change += absolute
            numbers.squared_change += squared
            numbers.squared_norm += norm
        report.replaced += part["replaced"]
        report.nonfinite += part["nonfinite"]
        report.notices += [text for text in part["notices"] if text not in report.notices]
        for what, seconds in part["seconds"].items():
            # Ranks work at the same time.
            report.seconds[what] = max(report.seconds[what], seconds)

    # ------------------------------------------------------------------ what needs all parts

    def reset(self) -> None:
        """Write fresh values: weight and variance 1, everything else 0."""
        for tensor in self.plan.with_action(Action.RESET):
            assert tensor.layer is not None
            ones = tensor.name in (tensor.layer.weight, tensor.layer.running_var)
            if not is_float(tensor.dtype):
                values = torch.zeros(tensor.nbytes, dtype=torch.uint8)
            else:
                values = torch.full(
                    (tensor.elements,), float(ones), dtype=torch_dtype(tensor.dtype)
                )
            for _, writer in self.outputs:
                writer.write(tensor.name, 0, as_bytes(values))

    def rescale(self) -> None:
        """Adjust running statistics to the weights that were predicted before them."""
        rescaled = {tensor.name for tensor in self.plan.with_action(Action.RESCALE)}
        for layer in self.layers:
            for step, writer in self.outputs:
                last = writer is self.outputs[-1][1]
                self._rescale(layer, rescaled, step, writer, last=last)

    def _rescale(
        self, layer: NormLayer, rescaled: Container[str], step: int, writer: Sink, *, last: bool
    ) -> None:
        names = layer.running_mean, layer.running_var
        assert layer.source_weight is not None
        before = {name: self._values(name) for name in names if name is not None}
        mean, variance = before.values()
        bias = np.zeros_like(mean)
        if layer.source_bias is not None:
            bias = self._values(layer.source_bias)
        bias_after = self.biases.get((step, layer.source_bias or ""), bias)
        after = self.sums[step, layer.source_weight].mean_and_variance(
            mean, variance, bias, bias_after
        )
        for (name, old), new in zip(before.items(), after, strict=True):
            if name not in rescaled:
                continue
            entry = self.trajectory.first.tensors[name]
            if not np.isfinite(old).all() and not self.settings.allow_nonfinite:
                raise CheckpointError(
                    f"{entry.path}: tensor {name!r}: has values that are not finite; "
                    "--allow-nonfinite copies those from the first checkpoint"
                )
            values = torch.from_numpy(new).to(torch_dtype(entry.dtype))
            original = read_elements(self.trajectory.first, entry, 0, len(values))
            finite = torch.isfinite(values)
            if last:
                self.report.nonfinite += int((~np.isfinite(old)).sum())
            self.report.replaced += int((~finite.numpy() & np.isfinite(old)).sum())
            writer.write(name, 0, as_bytes(torch.where(finite, values, original)))

    def _values(self, name: str) -> np.ndarray:
        """A whole small tensor of Θ0, float64."""
        entry = self.trajectory.first.tensors[name]
        values = read_elements(self.trajectory.first, entry, 0, entry.info.elements)
        return values.double().numpy()
