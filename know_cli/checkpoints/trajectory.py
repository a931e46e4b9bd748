"""S checkpoints of one model, checked against each other and put in order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from know_cli.checkpoints.dtypes import is_float
from know_cli.checkpoints.metadata import Continuation, Session
from know_cli.checkpoints.paths import check_count
from know_cli.errors import CheckpointError, UsageError, quoted

_MAX_DIFFERENCES = 10


@dataclass
class Trajectory:
    """Open checkpoints Θ0 (full data) first, most-forgotten last; names and shapes agree.

    Attributes:
        checkpoints: the S checkpoints in order.
        rate: the sampling rate from one to the next that their metadata agree on, or None.
        stride: how many sessions one is from the next, 1 unless their metadata say otherwise.
        notices: what was put right, or looks odd, in words for the user.
    """

    checkpoints: list[Checkpoint]
    rate: float | None
    notices: list[str]
    stride: int = 1

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def first(self) -> Checkpoint:
        """Θ0, whose names, dtypes, metadata and layout the output takes."""
        return self.checkpoints[0]

    def entries(self, name: str) -> list[TensorEntry]:
        """One tensor in all S checkpoints, Θ0 first."""
        return [checkpoint.tensors[name] for checkpoint in self.checkpoints]

    def check_unchanged(self) -> None:
        """Refuse inputs that have changed since they were opened.

        Raises:
            CheckpointError: with the file.
        """
        for checkpoint in self.checkpoints:
            checkpoint.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_trajectory(paths: Sequence[Path]) -> Trajectory:
    """Open 2 to 16 checkpoints of one model; only their headers are read.

    Checkpoints that carry a session index are put in its order.

    Raises:
        UsageError: too few or too many paths, or one given twice.
        CheckpointError: one cannot be used, they differ in names or shapes, or their recorded
            sessions contradict each other.
    """
    check_count(paths)
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        _refuse_same_file(checkpoints)
        checkpoints, rate, notices = _put_in_order(checkpoints)
        stride = _stride(checkpoints)
        if rate is not None and stride > 1:
            rate **= stride
            notices.append(
                f"the checkpoints are {stride} sessions apart: the sampling rate from one to the "
                f"next is {rate:.3g}"
            )
        check_same_model(checkpoints)
        stack.pop_all()
    return Trajectory(checkpoints, rate, notices, stride)


def _stride(checkpoints: list[Checkpoint]) -> int:
    """How many sessions all checkpoints are from the next; 1 where that differs or is unknown."""
    sessions = [Session.from_metadata(checkpoint.metadata) for checkpoint in checkpoints]
    apart = {
        other.index - one.index if one and other else 1
        for one, other in itertools.pairwise(sessions)
    }
    return apart.pop() if len(apart) == 1 else 1


def _refuse_same_file(checkpoints: list[Checkpoint]) -> None:
    """A folder and the file in it are one checkpoint, too."""
    seen: dict[tuple[int, int], Path] = {}
    for checkpoint in checkpoints:
        for file in checkpoint.headers:
            found = file.stat()
            same = seen.setdefault((found.st_dev, found.st_ino), file)
            if same is not file:
                raise UsageError(
                    f"{file}: given twice, also as {same}; each session has a checkpoint of its own"
                )


def _put_in_order(
    checkpoints: list[Checkpoint],
) -> tuple[list[Checkpoint], float | None, list[str]]:
    """Order by recorded session; (ordered, common rate or None, notices)."""
    for checkpoint in checkpoints:
        if Continuation.from_metadata(checkpoint.metadata) is not None:
            raise CheckpointError(
                f"{checkpoint.path}: is the first checkpoint trained further on more data, no "
                "session of the forgetting; leave it out"
            )
    sessions = [Session.from_metadata(checkpoint.metadata) for checkpoint in checkpoints]
    recorded = [
        (session, checkpoint)
        for session, checkpoint in zip(sessions, checkpoints, strict=True)
        if session is not None
    ]
    notices: list[str] = []
    if not recorded:
        return checkpoints, None, notices
    if len({session.trajectory for session, _ in recorded}) > 1:
        (first, one), (second, other) = _two_different(recorded)
        raise CheckpointError(
            f"{other.path}: is of another trajectory ({quoted(second.trajectory)}) than {one.path} "
            f"({quoted(first.trajectory)}); give checkpoints of one trajectory"
        )
    indices = [session.index for session, _ in recorded]
    in_order = sorted(indices)
    if len(set(indices)) < len(indices):
        twice = next(index for index in in_order if indices.count(index) > 1)
        names = ", ".join(str(c.path) for s, c in recorded if s.index == twice)
        raise CheckpointError(
            f"{names}: recorded as the same session {twice}; give one checkpoint a session"
        )
    if indices != in_order:
        if len(recorded) < len(checkpoints):
            missing = next(c for s, c in zip(sessions, checkpoints, strict=True) if s is None)
            raise CheckpointError(
                f"{missing.path}: has no recorded session, and those of the others are out of "
                f"order ({_listing(indices)}); give them in order, full data first"
            )
        checkpoints = [c for _, c in sorted(recorded, key=lambda pair: pair[0].index)]
        notices.append(
            f"checkpoints were given in session order {_listing(indices)}; "
            f"put right to {_listing(in_order)}"
        )
    if len({other - one for one, other in itertools.pairwise(in_order)}) > 1:
        notices.append(f"sessions {_listing(in_order)} are not equally far apart")
    rates = {session.rate for session, _ in recorded}
    return checkpoints, rates.pop() if len(rates) == 1 else None, notices


def _two_different(
    recorded: list[tuple[Session, Checkpoint]],
) -> tuple[tuple[Session, Checkpoint], tuple[Session, Checkpoint]]:
    first = recorded[0]
    return first, next(pair for pair in recorded if pair[0].trajectory != first[0].trajectory)


def _listing(indices: Sequence[int]) -> str:
    return ", ".join(str(index) for index in indices)


def check_same_model(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints whose names, shapes or computability differ from the first one's.

    Raises:
        CheckpointError: they differ; up to ten differences are listed.
    """
    first, differences = checkpoints[0], []
    for other in checkpoints[1:]:
        for name in first.tensors.keys() - other.tensors.keys():
            differences.append((name, f"{quoted(name)} is missing in {other.path}"))
        for name in other.tensors.keys() - first.tensors.keys():
            differences.append((name, f"{quoted(name)} is only in {other.path}"))
        for name in first.tensors.keys() & other.tensors.keys():
            one, two = first.tensors[name], other.tensors[name]
            if one.shape != two.shape:
                differences.append(
                    (name, f"{quoted(name)} is {_shape(one)} but {_shape(two)} in {other.path}")
                )
            elif one.dtype != two.dtype and not (is_float(one.dtype) and is_float(two.dtype)):
                differences.append(
                    (name, f"{quoted(name)} is {one.dtype} but {two.dtype} in {other.path}")
                )
    if differences:
        differences.sort()
        shown = "; ".join(text for _, text in differences[:_MAX_DIFFERENCES])
        more = len(differences) - _MAX_DIFFERENCES
        raise CheckpointError(
            f"{first.path}: the checkpoints are not of one model: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )


def _shape(entry: TensorEntry) -> str:
    return "x".join(str(size) for size in entry.shape) or "a scalar"
