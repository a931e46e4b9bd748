"""``know inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.options import no_progress_option, quiet_option
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
    quiet: Annotated[bool, quiet_option()] = False,
    no_progress: Annotated[bool, no_progress_option()] = False,
) -> None:
    """Show a trajectory before predicting: order, step lengths, directions, what is odd."""
    from know_cli.checkpoints import open_trajectory
    from know_cli.checkpoints.paths import expand_arguments
    from know_cli.checkpoints.trajectory import data_notices
    from know_cli.cli.progress import progress_for
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.engine.classification import classify_values
    from know_cli.errors import UsageError
    from know_cli.kinds import only_copied, parse_override
    from know_cli.prediction.inspection import inspect_trajectory

    talk = Output(quiet, aside=takes_stdout(json))
    paths = expand_arguments(checkpoints, talk.notice)
    if json is not None:
        check_report_path(json, paths, "--json")
    try:
        overrides = tuple(parse_override(text) for text in kind or ())
    except ValueError as error:
        raise UsageError(str(error)) from error
    with open_trajectory(paths, only_copied(overrides)) as trajectory:
        if json is not None:
            files = [file for checkpoint in trajectory.checkpoints for file in checkpoint.headers]
            check_report_path(json, files, "--json")
        found = classify_values(trajectory, overrides)
        for notice in (*trajectory.notices, *data_notices(trajectory), *found.notices):
            talk.notice(notice)
        with progress_for(talk, bar=not no_progress) as progress:
            inspection = inspect_trajectory(trajectory, found.classes, progress)
        talk.show(*_tables(trajectory, inspection))
        if json is not None:
            order = [str(checkpoint.path) for checkpoint in trajectory.checkpoints]
            write_report(
                json, {"checkpoints": order, "rate": trajectory.rate, **inspection.to_json()}
            )


def _tables(trajectory: Trajectory, inspection: Inspection) -> list[RenderableType]:
    from know_cli.cli.tables import bytes_text, count_text, new_table

    files = new_table("checkpoint", "session", "fraction", "size")
    for checkpoint in trajectory.checkpoints:
        files.add_row(
            str(checkpoint.path), *_session(checkpoint.metadata), bytes_text(checkpoint.nbytes)
        )
    size = len(trajectory)
    steps = [f"{k} to {k + 1}" for k in range(size - 1)]
    lengths = new_table("length of step", "tensors", "parameters", *steps)
    cosines = new_table("cosine of steps", *(f"{k},{k + 1},{k + 2}" for k in range(size - 2)))
    rows = [(kind.value, movement) for kind, movement in inspection.kinds.items()]
    for name, movement in [*rows, ("conv, fc and bias", inspection.total)]:
        lengths.add_row(
            name,
            str(movement.tensors),
            count_text(movement.parameters),
            *(f"{length:.4g}" for length in movement.step_lengths),
        )
        cosines.add_row(name, *("-" if c is None else f"{c:+.3f}" for c in movement.cosines))
    rate = "not recorded" if trajectory.rate is None else f"{trajectory.rate:.3g}"
    lines: list[RenderableType] = [
        f"{size} checkpoints, sampling rate {rate}",
        "",
        files,
        "",
        lengths,
    ]
    if size > 2:
        lines += ["", cosines]
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


def _session(metadata: dict[str, str]) -> tuple[str, str]:
    from know_cli.checkpoints.metadata import Session

    session = Session.from_metadata(metadata)
    return ("-", "-") if session is None else (str(session.index), f"{session.fraction:.3g}")


def _names(what: str, names: Sequence[str]) -> str:
    if not names:
        return f"tensors {what}: none"
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"tensors {what}: {', '.join(names[:_MAX_NAMES])}{more}"
