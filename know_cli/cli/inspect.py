"""``know inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.options import (
    every_option,
    force_option,
    last_option,
    no_progress_option,
    quiet_option,
    trajectory_option,
)
from know_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.checkpoints import Trajectory
    from know_cli.prediction.inspection import Inspection

_MAX_NAMES = 8


def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            show_default=False,
            help="The checkpoints as for 'know predict', full data first.",
        ),
    ],
    trajectory: Annotated[TrajectoryKind | None, trajectory_option()] = None,
    last: Annotated[int | None, last_option()] = None,
    every: Annotated[int | None, every_option()] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=KIND",
            show_default=False,
            help="Set the kind of the tensors that a glob matches. Repeatable.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            show_default=False,
            help="Write what is found as JSON; - is standard output.",
        ),
    ] = None,
    force: Annotated[bool, force_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
    no_progress: Annotated[bool, no_progress_option()] = False,
) -> None:
    """Show a trajectory before predicting: order, step lengths, directions, what is odd."""
    from know_cli.checkpoints import open_trajectory
    from know_cli.checkpoints.arguments import find_checkpoints
    from know_cli.checkpoints.trajectory import data_notices
    from know_cli.cli.progress import progress_for
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.engine.classification import classify_values
    from know_cli.errors import UsageError
    from know_cli.kinds import only_copied, parse_override
    from know_cli.prediction.inspection import inspect_trajectory

    talk = Output(quiet, aside=takes_stdout(json))
    paths, found = find_checkpoints(checkpoints, trajectory, talk.notice, last=last, every=every)
    if json is not None:
        check_report_path(json, paths, "--json", force=force)
    try:
        overrides = tuple(parse_override(text) for text in kind or ())
    except ValueError as error:
        raise UsageError(str(error)) from error
    with open_trajectory(paths, only_copied(overrides), found) as opened:
        if json is not None:
            files = [file for checkpoint in opened.checkpoints for file in checkpoint.headers]
            check_report_path(json, files, "--json", force=force)
        classified = classify_values(opened, overrides)
        for notice in (*opened.notices, *data_notices(opened), *classified.notices):
            talk.notice(notice)
        with progress_for(talk, bar=not no_progress) as progress:
            inspection = inspect_trajectory(opened, classified.classes, progress)
        talk.show(*_tables(opened, inspection))
        if json is not None:
            content = {**_described(opened), **inspection.to_json()}
            write_report(json, content, force=force)


def _described(trajectory: Trajectory) -> dict[str, Any]:
    described: dict[str, Any] = {
        "checkpoints": [str(checkpoint.path) for checkpoint in trajectory.checkpoints],
        "trajectory": trajectory.kind.value,
        "rate": trajectory.rate,
    }
    if trajectory.kind is TrajectoryKind.RUN:
        described["training_steps"] = trajectory.training_steps
    return described


def _tables(trajectory: Trajectory, inspection: Inspection) -> list[RenderableType]:
    from know_cli.cli.tables import count_text, new_table, trajectory_text

    of_branches = trajectory.kind is TrajectoryKind.BRANCHES
    if trajectory.kind is TrajectoryKind.FORGETTING:
        rate = "not recorded" if trajectory.rate is None else f"{trajectory.rate:.3g}"
        title = f"{len(trajectory)} checkpoints, sampling rate {rate}"
    else:
        title = trajectory_text(trajectory)
    names = _step_names(trajectory)
    lengths = new_table(
        "distance from Θ0" if of_branches else "length of step", "tensors", "parameters", *names
    )
    rows = [(kind.value, movement) for kind, movement in inspection.kinds.items()]
    for name, movement in [*rows, ("conv, fc and bias", inspection.total)]:
        lengths.add_row(
            name,
            str(movement.tensors),
            count_text(movement.parameters),
            *(f"{length:.4g}" for length in movement.step_lengths),
        )
    lines: list[RenderableType] = [title, "", _files(trajectory), "", lengths]
    if len(trajectory) > 2:
        lines += ["", _cosines(inspection, len(trajectory), names)]
    lines.append("")
    lines.append(_names("frozen", inspection.frozen))
    lines.append(
        _names(
            "with values that are not finite",
            [f"{tensor} in {path} ({count})" for path, tensor, count in inspection.nonfinite],
        )
    )
    lines += [f"warning: {warning}" for warning in inspection.warnings]
    return lines


def _step_names(trajectory: Trajectory) -> list[str]:
    """What the steps between checkpoints are called; of branches, what they are."""
    size = len(trajectory)
    if trajectory.kind is TrajectoryKind.BRANCHES:
        return [f"branch {k}" for k in range(1, size)]
    numbers = None
    if trajectory.kind is TrajectoryKind.RUN:
        numbers = trajectory.training_steps
    return [f"{one} to {two}" for one, two in pairwise(numbers or range(size))]


def _cosines(inspection: Inspection, size: int, names: Sequence[str]) -> RenderableType:
    """Cosines of each step and the next, kind by kind; of branches those of every two in all."""
    from know_cli.cli.tables import new_table

    if inspection.trajectory is TrajectoryKind.BRANCHES:
        table = new_table("cosine of branches", *names)
        for name, cosines in zip(names, inspection.total.cosines_of_branches, strict=True):
            table.add_row(name, *map(_cosine, cosines))
        return table
    table = new_table("cosine of steps", *(f"{k},{k + 1},{k + 2}" for k in range(size - 2)))
    rows = [(kind.value, movement) for kind, movement in inspection.kinds.items()]
    for name, movement in [*rows, ("conv, fc and bias", inspection.total)]:
        table.add_row(name, *map(_cosine, movement.cosines))
    return table


def _cosine(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:+.3f}"


def _files(trajectory: Trajectory) -> RenderableType:
    """The checkpoints, with what is recorded of each."""
    from know_cli.cli.tables import bytes_text, new_table

    kind, steps = trajectory.kind, None
    columns = ["session", "fraction"]
    if kind is TrajectoryKind.RUN:
        columns, steps = ["training step"], trajectory.training_steps
    elif kind is TrajectoryKind.BRANCHES:
        columns = ["branch", "fraction", "seed"]
    table = new_table("checkpoint", *columns, "size")
    for k, checkpoint in enumerate(trajectory.checkpoints):
        facts = _session(checkpoint.metadata)
        if kind is TrajectoryKind.RUN:
            facts = ["-" if steps is None else str(steps[k])]
        elif kind is TrajectoryKind.BRANCHES:
            facts = _branch(checkpoint.metadata)
        table.add_row(str(checkpoint.path), *facts, bytes_text(checkpoint.nbytes))
    return table


def _session(metadata: dict[str, str]) -> list[str]:
    from know_cli.checkpoints.metadata import Session

    session = Session.from_metadata(metadata)
    return ["-", "-"] if session is None else [str(session.index), f"{session.fraction:.3g}"]


def _branch(metadata: dict[str, str]) -> list[str]:
    from know_cli.checkpoints.metadata import Branch

    branch = Branch.from_metadata(metadata)
    if branch is None:
        return ["-", "-", "-"]
    return [str(branch.index), f"{branch.fraction:.3g}", str(branch.seed)]


def _names(what: str, names: Sequence[str]) -> str:
    if not names:
        return f"tensors {what}: none"
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"tensors {what}: {', '.join(names[:_MAX_NAMES])}{more}"
