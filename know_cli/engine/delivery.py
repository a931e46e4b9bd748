"""From predictions in memory to bytes in the outputs, and all that is copied beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints import Checkpoint, Sink
from know_cli.checkpoints.dtypes import FLOATS, is_float, torch_dtype
from know_cli.checkpoints.reading import as_bytes, chunks, read_elements
from know_cli.engine.batches import Buffer, Stretch, cut_stretches, write_stretch
from know_cli.engine.casting import Casting, read_before
from know_cli.engine.job import Job
from know_cli.engine.journal import Finished
from know_cli.engine.plan import Batch, Copy, PlannedTensor
from know_cli.engine.report import Report
from know_cli.engine.running_statistics import RunningStatistics, averaged
from know_cli.engine.written import Written, copied_rows
from know_cli.errors import CheckpointError, counted, quoted
from know_cli.passes.numbers import Mask, change_sums

_COPY_BYTES = 1 << 20
# Tensors that a notice names.
_NAMED = 5


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
        nonfinite: how many input values were not finite and are Θ0's values, by tensor.
        replaced: how many predictions were not finite and are Θ0's values, by tensor.
    """

    job: Job
    outputs: Sequence[tuple[int, Sink]]
    report: Report
    statistics: RunningStatistics
    copied_nonfinite: dict[str, int] = field(default_factory=dict)
    nonfinite: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)

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

    def write(
        self,
        batch: Batch,
        buffer: Buffer,
        truncation: float | None = None,
        *,
        is_next: bool = False,
    ) -> Written:
        """Write a predicted batch to every output; safe to call from several threads.

        Args:
            batch: that was predicted.
            buffer: where its predictions are; it is needed until :meth:`account` has returned.
            truncation: the relative error of what does not fit into its tensors, if it is a group
                of which not all may.
            is_next: whether all batches before it are accounted for, so that nothing needs to be
                kept for the journal.

        Returns:
            What is to be known of it, for :meth:`account`.

        Raises:
            CheckpointError: a prediction is not finite, and ``allow_nonfinite`` does not allow
                that.
            OutputError: an output cannot be written.
        """
        frozen, replaced = 0, Counter[str]()
        written = Written(batch)
        rows: list[int] = []
        if buffer.is_marked:
            rows = np.flatnonzero(buffer.copied[: batch.rows].numpy()).tolist()
        for stretch in self._stretches(batch):
            casting = Casting(self.job, batch, stretch, buffer)
            frozen += casting.frozen
            for step, sink in self.outputs:
                values, where = casting.after(step)
                if where is not None:
                    replaced.update(_counts(stretch, where))
                with self.report.timed("writing"):
                    write_stretch(sink, stretch, values)
                if self.job.journal is not None and is_next:
                    self.job.journal.add(as_bytes(values))
                elif self.job.journal is not None:
                    written.data.append(as_bytes(values))
                copied = buffer.copied[stretch.rows] if rows else None
                self._observe(written, step, stretch, casting.before, values, copied)
        written.facts = {
            "frozen": frozen,
            "replaced": dict(replaced),
            "copied": rows,
            "truncation": truncation,
        }
        return written

    def write_finished(self, batch: Batch, finished: Finished) -> None:
        """Write what the journal has, and take from it what :meth:`write` would.

        Raises:
            OutputError: an output cannot be written.
        """
        journal = self.job.journal
        assert journal is not None
        position = finished.position
        written = Written(batch, facts=finished.facts)
        copied = torch.zeros(batch.rows, dtype=torch.bool)
        copied[torch.tensor(finished.facts["copied"], dtype=torch.int64)] = True
        for stretch in self._stretches(batch):
            before = read_before(self.job, stretch)
            for step, sink in self.outputs:
                values = torch.empty(stretch.count, dtype=torch_dtype(stretch.dtype))
                journal.read(position, as_bytes(values))
                position += values.nbytes
                write_stretch(sink, stretch, values)
                self._observe(written, step, stretch, before, values, copied[stretch.rows])
        self._count(written)

    def account(self, written: Written) -> None:
        """Take in what is to be known of a batch that is written, in the order of the plan.

        Raises:
            OutputError: there is no space for the journal.
        """
        if self.job.journal is not None:
            with self.report.timed("writing"):
                for data in written.data:
                    self.job.journal.add(data)
                self.job.journal.finish(written.facts)
        self._count(written)

    def _count(self, written: Written) -> None:
        batch, facts = written.batch, written.facts
        self.statistics.take(written.measured)
        for kind, sums in written.changes:
            self.report.kinds[kind].add_changes(sums)
        self.report.kinds[batch.kind].frozen += facts["frozen"]
        self.report.replaced += sum(facts["replaced"].values())
        self.report.nonfinite += len(facts["copied"])
        self.nonfinite.update(copied_rows(batch, facts["copied"]))
        self.replaced.update(facts["replaced"])
        if facts["truncation"] is not None:
            self.report.truncations[batch.segments[0].tensor.name] = facts["truncation"]
        self.job.progress.advance(batch.rows)

    def _stretches(self, batch: Batch) -> Iterator[Stretch]:
        return cut_stretches(batch, self.job.plan.block_rows, self.job.plan.stretch_rows)

    def _observe(
        self,
        written: Written,
        step: int,
        stretch: Stretch,
        before: Tensor,
        values: Tensor,
        copied: Tensor | None,
    ) -> None:
        """Take from what was written whatever rescaling and the report need."""
        last = step == self.outputs[-1][0]
        needs = self.statistics.needs(step, stretch)
        if not (last or needs):
            return
        old, new = before, values
        if copied is not None and copied.numpy().any():
            # A copied value has not changed; its history was blanked out before predicting.
            new = values.to(before.dtype)
            old = torch.where(copied, new, before)
            old, new = (torch.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0) for v in (old, new))
        if needs:
            doubles = (values.double(), old.double(), new.double())
            written.measured += self.statistics.measure(step, stretch, *doubles)
        if last:
            sums = change_sums(old, new, stretch.rows.start, self.job.plan.block_rows)
            written.changes.append((stretch.kind, sums))

    # ------------------------------------------------------------------ what is not

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy tensors, or parts of them, byte by byte from Θ0.

        Raises:
            OutputError: an output cannot be written.
        """
        sinks = [sink for _, sink in self.outputs]
        for copy in copies:
            self.copy_to(copy, sinks)

    def copy_to(self, copy: Copy, sinks: Sequence[Sink]) -> None:
        """Copy one tensor, or a part of it, also to the outputs of others.

        Raises:
            OutputError: an output cannot be written.
        """
        nonfinite = self._copy(copy, sinks)
        if copy.nbytes == copy.tensor.nbytes:
            self._note_copied(copy.tensor, nonfinite)
        elif nonfinite:
            self.copied_nonfinite[copy.tensor.name] = nonfinite

    def _copy(self, copy: Copy, sinks: Sequence[Sink]) -> int:
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
                for sink in sinks:
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
                f"{entry.path}: tensor {tensor.name!r} is copied with "
                f"{counted(nonfinite, 'value')} that {'is' if nonfinite == 1 else 'are'} not finite"
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
            CheckpointError: some are not finite, before or after.
            OutputError: an output cannot be written.
        """
        first = self.job.trajectory.first
        for tensor in tensors:
            original, old = self._statistics_of(first, tensor)
            for step, sink in self.outputs:
                values = self.statistics.rescaled(step, tensor).to(original.dtype)
                self._write_statistics(
                    sink, tensor, values, original, old, f"rescaled after step {step}"
                )
            self._note_nonfinite(tensor, old)

    def average(self, tensors: Iterable[PlannedTensor]) -> None:
        """Write running statistics of the checkpoints' distributions, averaged.

        Raises:
            CheckpointError: some are not finite.
            OutputError: an output cannot be written.
        """
        trajectory, coefficients = self.job.trajectory, self._shares()
        for tensor in tensors:
            absent = trajectory.absent.get(tensor.name, ())
            found = [
                self._statistics_of(one, tensor)
                for k, one in enumerate(trajectory.checkpoints)
                if k not in absent and coefficients[k]
            ]
            original, _ = self._statistics_of(trajectory.first, tensor)
            old = torch.stack([finite for _, finite in found]).all(dim=0)
            values = averaged(trajectory, coefficients, tensor).to(original.dtype)
            values = torch.where(old, values, original)
            for _, sink in self.outputs:
                self._write_statistics(sink, tensor, values, original, old, "averaged")
            self._note_nonfinite(tensor, old)

    def _shares(self) -> tuple[float, ...]:
        """By which running statistics are averaged, Θ0's first."""
        predictors, checkpoints = self.job.predictors, len(self.job.trajectory)
        if predictors.coefficients is not None:
            return predictors.coefficients
        moving = (t.movements for t in self.job.plan.tensors if t.movements is not None)
        first = next(moving, None)
        if predictors.mixture is None or first is None:  # nothing moves
            return (1.0, *[0.0] * (checkpoints - 1))
        return predictors.mixture(first.run)

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
        self,
        sink: Sink,
        tensor: PlannedTensor,
        values: Tensor,
        original: Tensor,
        old: Tensor,
        how: str,
    ) -> None:
        """Write running statistics, Θ0's where they did not come out finite from what was."""
        finite = torch.isfinite(values)
        replaced = int((~finite & old).sum())
        if replaced and not self.job.settings.allow_nonfinite:
            what = counted(replaced, "value")
            verb = "is" if replaced == 1 else "are"
            path = self.job.trajectory.first.tensors[tensor.name].path
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r}: {what} {how} {verb} not finite in "
                f"{FLOATS[tensor.dtype]}; --allow-nonfinite copies such values from the first "
                "checkpoint, --norm copy all of them"
            )
        self.report.replaced += replaced
        self.replaced.update({tensor.name: replaced} if replaced else {})
        sink.write(tensor.name, 0, as_bytes(torch.where(finite, values, original)))

    def tell_of_replaced(self) -> None:
        """Name the tensors with values that were taken from Θ0, when all are written."""
        for what, found in (("inputs", self.nonfinite), ("predictions", self.replaced)):
            named = [f"{quoted(name)} ({count})" for name, count in sorted(found.items())]
            more = len(named) - _NAMED
            others = f" and {counted(more, 'other tensor')}" if more > 0 else ""
            if named:
                self.job.notices.add(
                    f"{what} that are not finite have the first checkpoint's value: "
                    f"{', '.join(named[:_NAMED])}{others}"
                )

    def _note_nonfinite(self, tensor: PlannedTensor, finite: Tensor) -> None:
        """Count running statistics that are not finite in an input."""
        count = int((~finite).sum())
        self.report.nonfinite += count
        self.nonfinite.update({tensor.name: count} if count else {})


def _counts(stretch: Stretch, where: Mask) -> dict[str, int]:
    """In how many rows of each tensor a mask is set; without those in which it is not at all."""
    counts = ((s.tensor.name, int(np.count_nonzero(where[s.rows]))) for s in stretch.segments)
    return {name: count for name, count in counts if count}
