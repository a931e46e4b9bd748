"""From predictions in memory to bytes in the outputs, and all that is copied beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from know_cli.checkpoints import Checkpoint, Sink
from know_cli.checkpoints.dtypes import is_float, torch_dtype
from know_cli.checkpoints.reading import as_bytes, chunks, read_elements, read_float32
from know_cli.engine.batches import Buffer, Stretch, cut_stretches, write_stretch
from know_cli.engine.job import Job
from know_cli.engine.journal import Finished
from know_cli.engine.plan import Batch, Copy, PlannedTensor
from know_cli.engine.report import Report
from know_cli.engine.running_statistics import RunningStatistics, averaged
from know_cli.errors import CheckpointError

_COPY_BYTES = 1 << 20


@dataclass
class Delivery:
    """Where the numbers of one execution go.

    Attributes:
        job: that is executed.
        outputs: of each its step and where it is written, in ascending order of step.
        report: is kept up to date.
        statistics: what rescaling needs to know of the weights that are written.
        copied_nonfinite: values that are not finite in copied tensors, of which only a part is
            copied here, by name.
    """

    job: Job
    outputs: Sequence[tuple[int, Sink]]
    report: Report
    statistics: RunningStatistics
    copied_nonfinite: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(job: Job, sinks: Sequence[Sink], report: Report) -> Delivery:
        """The delivery of a job, its outputs going to ``sinks``."""
        steps = [output.step for output in job.outputs]
        return Delivery(
            job,
            list(zip(steps, sinks, strict=True)),
            report,
            RunningStatistics.of(job.trajectory, job.plan, steps),
        )

    # ------------------------------------------------------------------ what is predicted

    def write(self, batch: Batch, buffer: Buffer, truncation: float | None = None) -> None:
        """Write a predicted batch to every output.

        Args:
            batch: that was predicted.
            buffer: where its predictions are.
            truncation: the relative error of what does not fit into its tensors, if it is a group
                of which not all may.

        Raises:
            OutputError: an output cannot be written.
        """
        replaced = sum(self._write_stretch(stretch, buffer) for stretch in cut_stretches(batch))
        copied = buffer.copied[: batch.rows]
        self.report.replaced += replaced
        self.report.nonfinite += int(copied.sum())
        if self.job.journal is not None:
            rows = torch.nonzero(copied).flatten().tolist()
            facts = {"replaced": replaced, "copied": rows, "truncation": truncation}
            self.job.journal.finish(facts)
        self._note_truncation(batch, truncation)
        self.job.progress.advance(batch.rows)

    def write_finished(self, batch: Batch, finished: Finished) -> None:
        """Write what the journal has, and take from it what :meth:`write` would.

        Raises:
            OutputError: an output cannot be written.
        """
        journal = self.job.journal
        assert journal is not None
        position, first = finished.position, self.job.trajectory.first
        copied = torch.zeros(batch.rows, dtype=torch.bool)
        copied[torch.tensor(finished.facts["copied"], dtype=torch.int64)] = True
        for stretch in cut_stretches(batch):
            before = torch.empty(stretch.count)
            for segment in stretch.segments:
                entry = first.tensors[segment.tensor.name]
                read_float32(first, entry, segment.start, before[segment.rows])
            for step, sink in self.outputs:
                values = torch.empty(stretch.count, dtype=torch_dtype(stretch.dtype))
                journal.read(position, as_bytes(values))
                position += values.nbytes
                write_stretch(sink, stretch, values)
                self._observe(step, stretch, before, values, copied[stretch.rows])
        self.report.replaced += finished.facts["replaced"]
        self.report.nonfinite += len(finished.facts["copied"])
        self._note_truncation(batch, finished.facts.get("truncation"))
        self.job.progress.advance(batch.rows)

    def _note_truncation(self, batch: Batch, truncation: float | None) -> None:
        if truncation is not None:
            self.report.truncations[batch.segments[0].tensor.name] = truncation

    def _write_stretch(self, stretch: Stretch, buffer: Buffer) -> int:
        """Write a stretch to every output.

        Returns:
            How many predictions were replaced by Θ0's values.
        """
        size, rows, replaced = len(self.job.trajectory), stretch.rows, 0
        before, copied = buffer.history[size - 1, rows], buffer.copied[rows]
        for step, sink in self.outputs:
            values, count = self._cast(
                stretch,
                buffer.history[size + step - 1, rows],
                copied,
                buffer.replaced[step - 1, rows],
            )
            replaced += count
            with self.report.timed("writing"):
                write_stretch(sink, stretch, values)
                if self.job.journal is not None:
                    self.job.journal.add(as_bytes(values))
            self._observe(step, stretch, before, values, copied)
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
        first, original = self.job.trajectory.first, torch.empty_like(cast)
        for segment in stretch.segments:
            entry = first.tensors[segment.tensor.name]
            original[segment.rows] = read_elements(first, entry, segment.start, segment.count)
        return torch.where(taken, original, cast), int(replaced.sum())

    def _observe(
        self, step: int, stretch: Stretch, before: Tensor, values: Tensor, copied: Tensor
    ) -> None:
        """Take from what was written whatever rescaling and the report need."""
        last = step == self.outputs[-1][0]
        if not (last or self.statistics.needs(step, stretch)):
            return
        new = values.double()
        # A copied value has not changed; its history was blanked out before predicting.
        old = torch.where(copied, new, before.double())
        self.statistics.take_biases(step, stretch, new)
        if copied.any():
            old, new = (torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (old, new))
        self.statistics.take_weights(step, stretch, old, new)
        if last:
            self.report.kinds[stretch.kind].add_change(old, new)

    # ------------------------------------------------------------------ what is not

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy tensors, or parts of them, byte by byte from Θ0.

        Raises:
            OutputError: an output cannot be written.
        """
        for copy in copies:
            nonfinite = self._copy(copy)
            if copy.nbytes == copy.tensor.nbytes:
                self._note_copied(copy.tensor, nonfinite)
            elif nonfinite:
                self.copied_nonfinite[copy.tensor.name] = nonfinite

    def _copy(self, copy: Copy) -> int:
        """Copy, and count the values that are not finite."""
        tensor, first, nonfinite = copy.tensor, self.job.trajectory.first, 0
        entry = first.tensors[tensor.name]
        drops_cached = self.job.drops_cached
        buffer = torch.empty(min(copy.nbytes, _COPY_BYTES), dtype=torch.uint8)
        for start, count in chunks(copy.start, copy.nbytes, _COPY_BYTES):
            self.job.ranks.check()
            data = buffer[:count]
            with self.report.timed("reading"):
                first.read_into(entry, start, as_bytes(data))
            with self.report.timed("writing"):
                for _, sink in self.outputs:
                    sink.write(tensor.name, start, as_bytes(data))
            if drops_cached:
                first.drop_cached(entry, start, count)
            if is_float(tensor.dtype):
                nonfinite += int((~torch.isfinite(data.view(torch_dtype(tensor.dtype)))).sum())
        return nonfinite

    def check_copied(self, copies: Iterable[Copy]) -> None:
        """Say of tensors that were copied in parts what is not finite, when all is counted."""
        for copy in copies:
            self._note_copied(copy.tensor, self.copied_nonfinite.get(copy.tensor.name, 0))

    def _note_copied(self, tensor: PlannedTensor, nonfinite: int) -> None:
        """Say what is copied as it is, such as a mask of −inf."""
        entry = self.job.trajectory.first.tensors[tensor.name]
        if nonfinite:
            self.job.notices.add(
                f"{entry.path}: tensor {tensor.name!r} is copied with {nonfinite} values that "
                "are not finite"
            )

    def reset(self, tensors: Iterable[PlannedTensor]) -> None:
        """Write fresh values: weight and variance 1, everything else 0.

        Raises:
            OutputError: an output cannot be written.
        """
        for tensor in tensors:
            assert tensor.layer is not None
            ones = tensor.name in (tensor.layer.weight, tensor.layer.running_var)
            if not is_float(tensor.dtype):
                values = torch.zeros(tensor.nbytes, dtype=torch.uint8)
            else:
                values = torch.full(
                    (tensor.elements,), float(ones), dtype=torch_dtype(tensor.dtype)
                )
            for _, sink in self.outputs:
                sink.write(tensor.name, 0, as_bytes(values))

    def rescale(self, tensors: Iterable[PlannedTensor]) -> None:
        """Write running statistics that are adjusted to the weights predicted before them.

        Raises:
            CheckpointError: some are not finite.
            OutputError: an output cannot be written.
        """
        first = self.job.trajectory.first
        for tensor in tensors:
            original, old = self._statistics_of(first, tensor)
            for step, sink in self.outputs:
                values = self.statistics.rescaled(step, tensor).to(original.dtype)
                self._write_statistics(sink, tensor, values, original, old)
            self.report.nonfinite += int((~old).sum())

    def average(self, tensors: Iterable[PlannedTensor]) -> None:
        """Write running statistics of the checkpoints' distributions, averaged.

        Raises:
            CheckpointError: some are not finite.
            OutputError: an output cannot be written.
        """
        trajectory, coefficients = self.job.trajectory, self.job.predictors.coefficients
        for tensor in tensors:
            assert coefficients is not None
            found = [self._statistics_of(one, tensor) for one in trajectory.checkpoints]
            original = found[0][0]
            old = torch.stack([finite for _, finite in found]).all(dim=0)
            values = averaged(trajectory, coefficients, tensor).to(original.dtype)
            values = torch.where(old, values, original)
            for _, sink in self.outputs:
                self._write_statistics(sink, tensor, values, original, old)
            self.report.nonfinite += int((~old).sum())

    def _statistics_of(
        self, checkpoint: Checkpoint, tensor: PlannedTensor
    ) -> tuple[Tensor, Tensor]:
        """Running statistics of a checkpoint in their own dtype, and where they are finite."""
        entry = checkpoint.tensors[tensor.name]
        values = read_elements(checkpoint, entry, 0, tensor.elements)
        finite = torch.isfinite(values)
        if not finite.all() and not self.job.settings.allow_nonfinite:
            raise CheckpointError(
                f"{entry.path}: tensor {tensor.name!r}: has values that are not finite; "
                "--allow-nonfinite copies those from the first checkpoint"
            )
        return values, finite

    def _write_statistics(
        self, sink: Sink, tensor: PlannedTensor, values: Tensor, original: Tensor, old: Tensor
    ) -> None:
        """Write running statistics, Θ0's where they did not come out finite from what was."""
        finite = torch.isfinite(values)
        self.report.replaced += int((~finite & old).sum())
        sink.write(tensor.name, 0, as_bytes(torch.where(finite, values, original)))
