"""Executes a job: what is predicted in worker threads, what is copied, and what comes last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from know_cli.checkpoints import CheckpointPart, CheckpointWriter, SharedPlace, Sink
from know_cli.engine.delivery import Delivery
from know_cli.engine.job import Job
from know_cli.engine.notices import Notices
from know_cli.engine.parts import share
from know_cli.engine.pipeline import predict
from know_cli.engine.report import Report, peak_resident
from know_cli.files.temporary import NameTakenError
from know_cli.ranks.alone import PeerError


def execute(job: Job) -> Report:
    """Predict, and write every output whole or not at all.

    All outputs are on disk before the first gets its name. Only if a renaming fails after that
    of an earlier step has that step's output, which is whole, been written alone.

    Several ranks call this with the same inputs and options; each writes its part, and has it on
    disk before rank 0 writes what needs the parts of all, and gives the outputs their names.

    Returns:
        The numbers of the run; on other ranks than 0 only of their part.

    Raises:
        CheckpointError: an input cannot be read, or it or a prediction of it has values that are
            not finite.
        OutputError: an output cannot be written.
        PeerError: another rank has failed.
    """
    began = time.perf_counter()
    ranks, progress = job.ranks, job.progress
    with ExitStack() as stack:
        sinks = open_sinks(job, stack)
        part = replace(job, plan=share(job.plan, ranks.rank, ranks.size))
        report = Report.of(part.plan.tensors)
        delivery = Delivery.of(part, sinks, report)
        if job.journal is not None:
            job.notices.add(*job.journal.notices)
        whose = f" as rank {ranks.rank} of {ranks.size}:" if ranks.size > 1 else ""
        progress.phase(f"predicting{whose}", part.plan.predicted)
        predict(part, delivery)
        progress.phase("copying")
        delivery.copy(part.plan.copies)
        if ranks.rank:
            _hand_over(job, delivery)
        else:
            _take_over(job, delivery)
            finish(delivery)
            job.trajectory.check_unchanged()
            if job.open_sink is None:
                progress.phase("flushing to disk")
            with report.timed("writing"):
                # All are on disk before the first is seen, so that hardly anything can come
                # between.
                for sink in sinks:
                    sink.flush()
                commit(sinks)
            with suppress(PeerError):  # the output is complete, whatever becomes of the others
                ranks.broadcast(None)
        if job.journal is not None:
            job.journal.remove()
        report.outputs = [(output.path, output.step) for output in job.outputs]
        report.bytes_written = sum(sink.file_bytes for sink in sinks)
        tell_of_other_files(job.notices, sinks)
    report.peak_memory = peak_resident()
    report.seconds["total"] = time.perf_counter() - began
    return report


def finish(delivery: Delivery) -> None:
    """Write what can only be written when all else is: what is reset, rescaled or averaged.

    Raises:
        CheckpointError: running statistics are not finite.
        OutputError: an output cannot be written.
    """
    plan = delivery.job.plan
    delivery.reset(plan.resets)
    delivery.rescale(plan.rescales)
    delivery.average(plan.averages)
    delivery.tell_of_replaced()


def commit(sinks: Sequence[Sink]) -> None:
    """Give all outputs their names; what another program took one of is kept beside it."""
    taken: list[NameTakenError] = []
    for sink in sinks:
        try:
            sink.commit()
        except NameTakenError as error:
            taken.append(error)
    if taken:
        raise taken[0]


def tell_of_other_files(notices: Notices, sinks: Sequence[Sink]) -> None:
    """Say what of Θ0's folder is not in an output, and what was in it before and stays."""
    for path in sinks[0].left_out:
        notices.add(f"{path}: left out, it is not part of the predicted weights")
    for sink in sinks:
        for path in sink.remaining:
            notices.add(f"{path}: was there before and stays, beside the predicted weights")


def open_sinks(job: Job, stack: ExitStack) -> list[Sink]:
    """Rank 0 begins the files, and all ranks open them."""
    if job.open_sink is not None:
        return [stack.enter_context(job.open_sink(output)) for output in job.outputs]
    like, outputs, ranks = job.trajectory.first, job.outputs, job.ranks
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


def _hand_over(job: Job, delivery: Delivery) -> None:
    """Flush this rank's part to disk, tell rank 0 what it needs to know, and wait for it."""
    job.trajectory.check_unchanged()
    with delivery.report.timed("writing"):
        for _, sink in delivery.outputs:
            sink.flush()
    job.ranks.gather(
        {
            "statistics": delivery.statistics.to_json(),
            "copied_nonfinite": delivery.copied_nonfinite,
            "nonfinite": dict(delivery.nonfinite),
            "replaced": dict(delivery.replaced),
            "report": delivery.report.share_to_json(),
            "notices": list(job.notices),
        }
    )
    job.ranks.broadcast(None)  # now the output is complete


def _take_over(job: Job, delivery: Delivery) -> None:
    """Wait for the parts of all ranks, and join what is to be known of them."""
    if job.ranks.size == 1:
        return
    job.progress.phase("waiting for the other ranks")
    _, *parts = job.ranks.gather(None)
    part: Mapping[str, Any]
    for part in parts:  # the order of ranks is that of the weights
        delivery.statistics.join(part["statistics"])
        delivery.report.join(part["report"])
        delivery.nonfinite.update(part["nonfinite"])
        delivery.replaced.update(part["replaced"])
        job.notices.add(*part["notices"])
        for name, count in part["copied_nonfinite"].items():
            delivery.copied_nonfinite[name] = delivery.copied_nonfinite.get(name, 0) + count
    delivery.check_copied(job.plan.copies)
