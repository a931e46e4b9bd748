"""The checkpoints of a picture: a trajectory, predictions from it, and others for comparison."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from know_cli.checkpoints import (
    Checkpoint,
    Trajectory,
    check_same_model,
    open_checkpoint,
    open_trajectory,
)
from know_cli.checkpoints import metadata as keys
from know_cli.checkpoints.metadata import Session, TrajectoryKind
from know_cli.checkpoints.paths import factor_name
from know_cli.engine.classification import classify_values
from know_cli.errors import UsageError, printable
from know_cli.kinds import PREDICTED_KINDS, Override, only_copied
from know_cli.methods.registry import METHODS
from know_cli.plots.plane import Plane

_STEPS = re.compile(r"[1-8]")
#: Methods that write the same for any number of steps: a step, or a factor, is no name for that.
_STEPLESS = {method.name for method in METHODS if not method.has_steps}


class Role(str, Enum):
    """The role of a checkpoint in a picture."""

    SESSION = "session"
    CHECKPOINT = "checkpoint"  # of a run
    BRANCH = "branch"  # or the Θ0 that branches go on from
    PREDICTION = "prediction"
    OTHER = "other"

    @property
    def is_of_trajectory(self) -> bool:
        """Whether it is one of the trajectory's own checkpoints."""
        return self in (Role.SESSION, Role.CHECKPOINT, Role.BRANCH)


@dataclass(frozen=True)
class Point:
    """A checkpoint with its names in a picture.

    Attributes:
        name: unique among the points.
        label: short name, unique within the series.
        series: that it belongs to: predictions of one method are one series.
        role: in the picture.
        checkpoint: open for reading.
    """

    name: str
    label: str
    series: str
    role: Role
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        for name in ("name", "label", "series"):  # strangers may have chosen them
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True)
class Points:
    """All checkpoints of a picture.

    Attributes:
        trajectory: the open checkpoints.
        points: first the S of the trajectory, starting with Θ0; then the predictions, in ascending
            order of steps within a series; then the others.
    """

    trajectory: Trajectory
    points: tuple[Point, ...]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of the points, in the same order."""
        return [point.checkpoint for point in self.points]


@contextmanager
def open_points(
    sessions: Sequence[Path],
    predictions: Sequence[tuple[str | None, Path]] = (),
    others: Mapping[str, Path] | None = None,
    overrides: Sequence[Override] = (),
    kind: TrajectoryKind | None = None,
) -> Iterator[Points]:
    """Open the checkpoints of a picture; they are closed at the end of the ``with`` block.

    Args:
        sessions: of the trajectory, full data first, or of a run, or branches with Θ0 first.
        predictions: name and path; one without a name is named after its metadata, or else after
            its file.
        others: by name.
        overrides: kinds that the user sets.
        kind: how the trajectory came about; None takes what the checkpoints tell.

    Raises:
        UsageError: there are too few or too many sessions, or two points have the same name.
        CheckpointError: a checkpoint cannot be used or belongs to another model.
    """
    with ExitStack() as stack:
        trajectory = stack.enter_context(open_trajectory(sessions, only_copied(overrides), kind))
        points = _own_points(trajectory)
        predicted = [
            (name, stack.enter_context(open_checkpoint(path))) for name, path in predictions
        ]
        points += _predictions(predicted)
        for name, path in (others or {}).items():
            checkpoint = stack.enter_context(open_checkpoint(path))
            points.append(Point(name, name, name, Role.OTHER, checkpoint))
        compared = [trajectory.first, *(p.checkpoint for p in points[len(trajectory) :])]
        check_same_model(compared, only_copied(overrides))
        _refuse_same_name(points)
        yield Points(trajectory, tuple(points))


def _own_points(trajectory: Trajectory) -> list[Point]:
    """The points of a trajectory's own checkpoints, Θ0 first."""
    names = [(f"Θ{k}", f"Θ{k}") for k in range(len(trajectory))]
    series, role = "sessions", Role.SESSION
    if trajectory.kind is TrajectoryKind.RUN:
        series, role, steps = "run", Role.CHECKPOINT, trajectory.training_steps
        names = names if steps is None else [(f"step {step}", str(step)) for step in steps]
    elif trajectory.kind is TrajectoryKind.BRANCHES:
        series, role = "branches", Role.BRANCH
        names[1:] = [(f"branch {k}", str(k)) for k in range(1, len(trajectory))]
    return [
        Point(name, label, series, role, checkpoint)
        for (name, label), checkpoint in zip(names, trajectory.checkpoints, strict=True)
    ]


def _predictions(predicted: Sequence[tuple[str | None, Checkpoint]]) -> list[Point]:
    """Points of predictions, series by series."""
    found = []
    for name, checkpoint in predicted:
        if name is not None:
            found.append((Point(name, name, name, Role.PREDICTION, checkpoint), 0))
        else:
            found.append(_by_metadata(checkpoint))
    series = list(dict.fromkeys(point.series for point, _ in found))
    found.sort(key=lambda pair: (series.index(pair[0].series), pair[1]))
    points = [point for point, _ in found]
    # Predictions with the same metadata are distinguished by their files.
    counts = Counter(point.name for point in points)
    return [point if counts[point.name] == 1 else _by_file(point.checkpoint) for point in points]


def _by_metadata(checkpoint: Checkpoint) -> tuple[Point, int]:
    """The point of a prediction as ``know predict`` writes it, and its number of steps."""
    found = checkpoint.metadata
    steps = found.get(keys.STEPS, "")
    if keys.METHOD not in found or not _STEPS.fullmatch(steps):
        return _by_file(checkpoint), 0
    session, series = Session.from_metadata(found), _series(found)
    if found[keys.METHOD] in _STEPLESS:
        return Point(series, found[keys.METHOD], series, Role.PREDICTION, checkpoint), int(steps)
    label = f"step {steps}"
    if session is not None and session.problem is None:
        label = factor_name(session.rate, int(steps)).replace("x", "×")
    return Point(f"{series} {label}", label, series, Role.PREDICTION, checkpoint), int(steps)


def _series(metadata: Mapping[str, str]) -> str:
    """What made a prediction, such as ``continuation`` or ``task-vector alpha=1 range=full``."""
    method = metadata[keys.METHOD]
    if method == "known":
        return metadata.get(keys.TARGET, method)
    try:
        options = json.loads(metadata.get(keys.OPTIONS, "{}"))
    except ValueError:
        options = {}
    if not isinstance(options, dict):
        return method
    return " ".join([method, *(f"{name}={value}" for name, value in options.items())])


def _by_file(checkpoint: Checkpoint) -> Point:
    name = checkpoint.path.name if checkpoint.is_folder else checkpoint.path.stem
    return Point(name, name, name, Role.PREDICTION, checkpoint)


def _refuse_same_name(points: Sequence[Point]) -> None:
    counts = Counter(point.name for point in points)
    for point in points:
        if counts[point.name] > 1:
            raise UsageError(
                f"{point.checkpoint.path}: another checkpoint is also named {point.name!r}; "
                "name one yourself: NAME=FILE"
            )


def measured_tensors(trajectory: Trajectory, overrides: Sequence[Override]) -> list[str]:
    """Names of the tensors that distances are measured over: those of kinds conv, fc and bias.

    What some branches do not have is left out.

    Raises:
        UsageError: there are none, or an override matches nothing.
    """
    classes = classify_values(trajectory, overrides).classes
    names = [
        name
        for name, found in classes.items()
        if found.kind in PREDICTED_KINDS and name not in trajectory.absent
    ]
    if not any(trajectory.first.tensors[name].info.elements for name in names):
        raise UsageError("the checkpoints have no parameters of kinds conv, fc or bias")
    return names


def _lasting(path: Path, temporary: Path | None) -> str | None:
    return None if temporary in path.parents else str(path)


def describe(
    points: Points, names: Sequence[str], plane: Plane, temporary: Path | None = None
) -> dict[str, Any]:
    """The content of a picture in plain types, for a JSON file.

    Args:
        points: the checkpoints.
        names: of the tensors that are measured.
        plane: that is drawn.
        temporary: a folder that will be gone; None if there is none.

    Returns:
        ``parameters``, the number over which distances are measured; ``shares`` of all axes in
        the squared distances; ``points`` with name, role, path (None of a file that will be
        gone), ``coordinates`` on all axes and ``off_plane``, the distance from the plane of the
        first two; ``distances``, a matrix.
    """
    tensors = points.trajectory.first.tensors
    return {
        "parameters": sum(tensors[name].info.elements for name in names),
        "shares": plane.shares.tolist(),
        "points": [
            {
                "name": point.name,
                "role": point.role.value,
                "path": _lasting(point.checkpoint.path, temporary),
                "coordinates": plane.coordinates[k].tolist(),
                "off_plane": float(plane.off_plane[k]),
            }
            for k, point in enumerate(points.points)
        ],
        "distances": plane.distances.tolist(),
    }
