"""The checkpoints that a command line names, and what kind of trajectory they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from know_cli.checkpoints.arrangement import OPTION, recorded_kind
from know_cli.checkpoints.layouts import SUFFIX, find_model, has_model
from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.paths import expand_arguments
from know_cli.checkpoints.run_folder import choose, read_metadata, run_checkpoints
from know_cli.checkpoints.training_step import names_show_steps
from know_cli.errors import CheckpointError, UsageError


def find_checkpoints(
    arguments: Sequence[str],
    kind: TrajectoryKind | None,
    notice: Callable[[str], None] = lambda text: None,
    *,
    last: int | None = None,
    every: int | None = None,
) -> tuple[list[Path], TrajectoryKind | None]:
    """The checkpoints that arguments stand for, in their order, and their kind of trajectory.

    Beside what :func:`~know_cli.checkpoints.paths.expand_arguments` knows, the folder of a run
    stands for all the checkpoints in it.

    Args:
        arguments: of the command line.
        kind: what the user says of them; None if nothing.
        notice: is told what the user should know of a range.
        last: of a run, only so many; see :func:`~know_cli.checkpoints.run_folder.choose`.
        every: of a run, only every so many.

    Returns:
        Paths, and ``kind`` or else what their metadata tell; None where these tell nothing.

    Raises:
        CheckpointError: one does not exist, their metadata contradict each other, or there are no
            steps to choose by.
        UsageError: a run's folder, ``last`` or ``every`` for what is not known to be a run.
    """
    paths: list[Path] = []
    folder = None
    for argument in arguments:
        members = _run_folder(argument, kind)
        if members:
            folder = argument
        elif kind is TrajectoryKind.RUN and len(arguments) == 1:
            _check_folder(argument)
        paths += members or expand_arguments([argument], notice)
    named = "--last" if last is not None else "--every" if every is not None else None
    metadata = [read_metadata(path) for path in paths] if kind is None or named else []
    if kind is None:
        kind = recorded_kind(list(zip(paths, metadata, strict=True)))
    if kind is not TrajectoryKind.RUN:
        if folder is not None:
            raise UsageError(
                f"{folder}: is a folder with checkpoints of a training run; add {OPTION} run to "
                "take all of them, or name checkpoints"
            )
        if named is not None:
            raise UsageError(f"{named}: says which checkpoints of a run to take; add {OPTION} run")
    if named is not None:
        paths = choose(paths, metadata, last, every)
    return paths, kind


def _check_folder(argument: str) -> None:
    """Refuse a folder, in which no checkpoints of a run were found, that is no checkpoint either.

    Raises:
        CheckpointError: it is none; the message says what is there, and what was looked for.
    """
    try:
        if Path(argument).is_dir():
            find_model(Path(argument))
    except OSError:  # a name too long, for one, which is said elsewhere
        return
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; nor has it a run's checkpoints, folders or {SUFFIX} files called "
            "checkpoint-500, step_500, ckpt-500, iter_500 or epoch_5"
            + _pattern_hint(Path(argument))
        ) from error


def _pattern_hint(folder: Path) -> str:
    """How to name the files in a folder whose names show a run's steps in another way."""
    pattern = str(folder / f"*{SUFFIX}")
    try:
        paths = expand_arguments([pattern])
    except CheckpointError:
        return ""
    return f"; to take all files there, give '{pattern}'" if names_show_steps(paths) else ""


def _run_folder(argument: str, kind: TrajectoryKind | None) -> list[Path]:
    """The checkpoints in a run's folder; none for what is something else."""
    path = Path(argument)
    try:
        if kind not in (None, TrajectoryKind.RUN) or not path.is_dir():
            return []
    except OSError:  # a name too long, for one, which is said elsewhere
        return []
    # At its end a trainer leaves the last weights in the run's folder, too.
    if kind is None and has_model(path):
        return []
    return run_checkpoints(path)
