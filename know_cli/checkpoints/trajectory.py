"""S checkpoints of one model, checked against each other and put in order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from know_cli.checkpoints.adapters import check_scales
from know_cli.checkpoints.alignment import (
    OnlyCopied,
    check_empty,
    check_same_model,
    dtype_notices,
    nothing,
)
from know_cli.checkpoints.arrangement import (
    kind_notices,
    order_branches,
    order_run,
    rate_notices,
    recorded_kind,
)
from know_cli.checkpoints.branches import align_branches
from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from know_cli.checkpoints.dtypes import is_float
from know_cli.checkpoints.metadata import (
    METHOD,
    Continuation,
    Session,
    TrajectoryKind,
    rate_problem,
)
from know_cli.checkpoints.paths import MIN_CHECKPOINTS, check_count
from know_cli.checkpoints.training_step import training_steps
from know_cli.errors import CheckpointError, UsageError, quoted, quoted_first

_NUMBER = re.compile(r"\d{1,18}")
# How much of each tensor tells whether two checkpoints are the same.
_LOOK_BYTES = 1 << 16
_COMPLEX = "C64"


@dataclass
class Trajectory:
    """Open checkpoints, Θ0 first; names and shapes of their weights agree.

    Θ0 is the one on the full data of a forgetting, the latest of a run, and the common start of
    branches.

    Attributes:
        checkpoints: the S checkpoints in order.
        rate: the sampling rate from one to the next that their metadata agree on, or None.
        stride: how many sessions one is from the next, 1 unless their metadata say otherwise.
        notices: what was put right, or looks odd, in words for the user.
        kind: how the checkpoints came about.
        absent: tensor → positions of the branches that do not have it in Θ0's shape; what is not
            here is in all.
    """

    checkpoints: list[Checkpoint]
    rate: float | None
    notices: list[str]
    stride: int = 1
    kind: TrajectoryKind = TrajectoryKind.FORGETTING
    absent: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def first(self) -> Checkpoint:
        """Θ0, whose names, dtypes, metadata and layout the output takes."""
        return self.checkpoints[0]

    @property
    def training_steps(self) -> list[int] | None:
        """The training step of each checkpoint, Θ0's first; None if one does not tell it."""
        return training_steps([(one.path, one.metadata) for one in self.checkpoints])

    def entries(self, name: str) -> list[TensorEntry]:
        """One tensor in all S checkpoints, Θ0 first; Θ0's for branches that do not have it.

        Raises:
            KeyError: one does not have it, which can only be if it is no weight.
        """
        absent = self.absent.get(name, ())
        return [
            self.first.tensors[name] if k in absent else checkpoint.tensors[name]
            for k, checkpoint in enumerate(self.checkpoints)
        ]

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


def open_trajectory(
    paths: Sequence[Path],
    only_copied: OnlyCopied = nothing,
    kind: TrajectoryKind | None = None,
    fewest: int = MIN_CHECKPOINTS,
) -> Trajectory:
    """Open 2 to 16 checkpoints of one model; only their headers are read.

    Checkpoints that carry a session index, or are of a run and tell their training steps, are put
    in its order.

    Args:
        paths: of the checkpoints.
        only_copied: tells which tensors are no weights; what is only copied need not be in all.
        kind: how they came about; None takes what their metadata tell, else a forgetting.
        fewest: 1 for what reads Θ0 only.

    Raises:
        UsageError: too few or too many paths, or one given twice.
        CheckpointError: one cannot be used, they differ in names or shapes, all weights are
            empty, adapters are scaled differently, or their recorded sessions, steps or branches
            contradict each other or cannot be.
    """
    check_count(paths, kind, fewest)
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        _refuse_same_file(checkpoints)
        try:
            recorded = recorded_kind([(each.path, each.metadata) for each in checkpoints])
        except CheckpointError:
            if kind is None:
                raise
            recorded = None
        notices = kind_notices(checkpoints, kind, recorded)
        kind = kind or recorded or TrajectoryKind.FORGETTING
        rate: float | None = None
        stride = 1
        absent: dict[str, frozenset[int]] = {}
        if kind is TrajectoryKind.FORGETTING:
            checkpoints, rate, stride, more = _forgetting(checkpoints)
            notices += more
        else:
            order = order_run if kind is TrajectoryKind.RUN else order_branches
            checkpoints, more = order(checkpoints)
            notices += more
        if kind is TrajectoryKind.RUN:
            notices += rate_notices(checkpoints[0])
        if kind is TrajectoryKind.BRANCHES:
            absent, more = align_branches(checkpoints, only_copied)
            notices += more
        else:
            notices += check_same_model(checkpoints, only_copied)
        check_scales(checkpoints)
        notices += check_empty(checkpoints[0], only_copied)
        notices += dtype_notices(checkpoints)
        stack.pop_all()
    return Trajectory(checkpoints, rate, notices, stride, kind, absent)


def _forgetting(
    checkpoints: list[Checkpoint],
) -> tuple[list[Checkpoint], float | None, int, list[str]]:
    """Put the sessions of a forgetting in order; (ordered, rate or None, stride, notices)."""
    checkpoints, rate, notices = _put_in_order(checkpoints)
    stride = _stride(checkpoints)
    if rate is not None and stride > 1:
        rate **= stride
        problem = rate_problem(rate)
        if problem is not None:
            raise CheckpointError(
                f"{checkpoints[0].path}: the checkpoints are recorded {stride} sessions apart, "
                f"which makes {problem}; give checkpoints that are nearer to each other"
            )
        notices.append(
            f"the checkpoints are {stride} sessions apart: the sampling rate from one to the "
            f"next is {rate:.3g}"
        )
    return checkpoints, rate, stride, notices


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
                raise UsageError(f"{file}: given twice, also as {same}; name each checkpoint once")


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
    for session, checkpoint in zip(sessions, checkpoints, strict=True):
        if session is not None and session.problem is not None:
            raise CheckpointError(
                f"{checkpoint.path}: its metadata tell of {session.problem}; the file is damaged "
                "or forged, record or save it again"
            )
    recorded = [
        (session, checkpoint)
        for session, checkpoint in zip(sessions, checkpoints, strict=True)
        if session is not None
    ]
    notices: list[str] = []
    if len(recorded) < len(checkpoints):
        notices += _odd_numbers([str(checkpoint.path) for checkpoint in checkpoints])
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
    # A prediction tells the rate between the checkpoints that it was made from, which can be
    # several sessions apart.
    trained = {session.rate for session, one in recorded if METHOD not in one.metadata}
    rates = trained or {session.rate for session, _ in recorded}
    return checkpoints, rates.pop() if len(rates) == 1 else None, notices


def _two_different(
    recorded: list[tuple[Session, Checkpoint]],
) -> tuple[tuple[Session, Checkpoint], tuple[Session, Checkpoint]]:
    first = recorded[0]
    return first, next(pair for pair in recorded if pair[0].trajectory != first[0].trajectory)


def _odd_numbers(names: Sequence[str]) -> list[str]:
    """A line for the user if numbers in names that are alike but for them go up and down."""
    if len({_NUMBER.sub("#", name) for name in names}) > 1:
        return []
    every = [[int(digits) for digits in _NUMBER.findall(name)] for name in names]
    # Names can have several numbers, as epoch and step are; they count like digits.
    differ = [k for k, column in enumerate(zip(*every, strict=True)) if len(set(column)) > 1]
    numbers = [tuple(own[k] for k in differ) for own in every]
    if numbers in (sorted(numbers), sorted(numbers, reverse=True)):
        return []
    listing = ", ".join("-".join(map(str, own)) for own in numbers)
    return [
        f"warning: the numbers in the checkpoints' names ({listing}) neither rise nor fall; the "
        "order is full data first, most-forgotten last"
    ]


def _listing(indices: Sequence[int]) -> str:
    return ", ".join(str(index) for index in indices)


def data_notices(trajectory: Trajectory) -> list[str]:
    """What looks odd in the data of a trajectory, of which little is read: lines for the user.

    Named are checkpoints that are the same, by the first 64 KiB of each tensor of floats, and
    complex tensors that are not the same in all checkpoints.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return [*_same_checkpoints(trajectory), *_moving_complex(trajectory)]


def _same_checkpoints(trajectory: Trajectory) -> list[str]:
    checkpoints = trajectory.checkpoints
    compared = [
        name
        for name, entry in trajectory.first.tensors.items()
        if is_float(entry.dtype) and entry.info.elements
    ]
    # Each group has what cannot be told apart yet.
    groups = [list(range(len(checkpoints)))] if compared else []
    for name in compared:
        if not groups:
            return []
        groups = [
            part for group in groups for part in _split(checkpoints, group, name) if len(part) > 1
        ]
    return [
        f"warning: {', '.join(str(checkpoints[k].path) for k in group)} have the same weights, as "
        f"far as the first {_LOOK_BYTES >> 10} KiB of each tensor show; was one saved twice?"
        for group in groups
    ]


def _split(checkpoints: Sequence[Checkpoint], group: list[int], name: str) -> list[list[int]]:
    """Checkpoints of a group, by the beginning of a tensor and its dtype."""
    found: dict[tuple[str, bytes], list[int]] = {}
    for k in group:
        entry = checkpoints[k].tensors.get(name)
        if entry is None:
            found.setdefault(("", b""), []).append(k)
            continue
        start = bytearray(min(entry.info.nbytes, _LOOK_BYTES))
        checkpoints[k].read_into(entry, 0, memoryview(start))
        found.setdefault((entry.dtype, bytes(start)), []).append(k)
    return list(found.values())


def _moving_complex(trajectory: Trajectory) -> list[str]:
    moving = [
        name
        for name, entry in trajectory.first.tensors.items()
        if entry.dtype == _COMPLEX and _moves(trajectory, name)
    ]
    if not moving:
        return []
    return [
        f"warning: complex tensors that differ between the checkpoints are not predicted but "
        f"copied: {quoted_first(moving)}; save them as real numbers (torch.view_as_real) to have "
        "them predicted"
    ]


def packed_notices(trajectory: Trajectory, packed: Iterable[str]) -> list[str]:
    """A line for the user if quantised weights, which are only copied, begin differently.

    Args:
        trajectory: the open checkpoints.
        packed: names of weights whose element type cannot be computed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    everyone = list(range(len(trajectory)))
    moving = [name for name in packed if len(_split(trajectory.checkpoints, everyone, name)) > 1]
    if not moving:
        return []
    return [
        "warning: quantised weights that differ between the checkpoints are not predicted but "
        f"copied from {trajectory.first.path}, beside others that are: {quoted_first(moving)}; "
        "save the checkpoints in floats of 16 bits or more to have all of them predicted"
    ]


def _moves(trajectory: Trajectory, name: str) -> bool:
    """Whether a tensor is not the same in all checkpoints that have it in the first's shape."""
    first = trajectory.first.tensors[name]
    others = [
        (checkpoint, checkpoint.tensors[name])
        for checkpoint in trajectory.checkpoints[1:]
        if name in checkpoint.tensors
    ]
    if any((e.dtype, e.shape) != (first.dtype, first.shape) for _, e in others):
        return True
    for start in range(0, first.info.nbytes, _LOOK_BYTES):
        size = min(_LOOK_BYTES, first.info.nbytes - start)
        one, two = bytearray(size), bytearray(size)
        trajectory.first.read_into(first, start, memoryview(one))
        for checkpoint, entry in others:
            checkpoint.read_into(entry, start, memoryview(two))
            if one != two:
                return True
    return False
