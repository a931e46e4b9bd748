"""``know plot``: pictures of trajectories, of landscapes around them, and of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.options import (
    every_option,
    last_option,
    no_progress_option,
    parse_named,
    quiet_option,
    trajectory_option,
)
from know_cli.cli.output import Output
from know_cli.cli.picture_file import check_picture
from know_cli.cli.plot_choice import EPILOG as CHOICE_EPILOG
from know_cli.cli.plot_choice import choice
from know_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.kinds import Override
    from know_cli.plots.plane import Plane
    from know_cli.plots.points import Points

TRAJECTORY_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot trajectory run/ckpt0..ckpt4 --prediction predicted.safetensors "
        "--other 'more data=run/continued1.safetensors' -o trajectory.svg",
    )
)
LANDSCAPE_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot landscape run/ckpt0..ckpt4 --prediction predicted.safetensors "
        "--evaluate measure.py:accuracy -o landscape.png",
    )
)
RESULTS_EPILOG = "\n\n".join(
    (
        "Example:",
        "know plot results evaluation/results.json --task 'fashion-*' --method continuation "
        "--method 'shrink-*' -o results.svg",
    )
)
_FEWEST_POINTS, _MOST_POINTS = 3, 201

_Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        show_default=False,
        help="The checkpoints, as for 'know predict', full data first.",
    ),
]
_Trajectory = Annotated[TrajectoryKind | None, trajectory_option()]
_Last = Annotated[int | None, last_option()]
_Every = Annotated[int | None, every_option()]
_Picture = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="FILE.png|.svg", show_default=False, help="The picture."
    ),
]
_Prediction = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        show_default=False,
        help="Also draw this prediction from them; repeatable.",
    ),
]
_Other = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        show_default=False,
        help="Also draw this checkpoint of the same model; repeatable.",
    ),
]
_Kind = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=KIND",
        show_default=False,
        help="Set the kind of the tensors that match a glob; tensors of kind copy do not count. "
        "Repeatable.",
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an existing picture.")]
_Json = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        show_default=False,
        help="Write what is drawn as JSON; - is standard output.",
    ),
]
_Quiet = Annotated[bool, quiet_option()]
_NoProgress = Annotated[bool, no_progress_option()]


@dataclass(frozen=True)
class _Request:
    """The request of a command about checkpoints, as far as it can be checked at once."""

    sessions: list[Path]
    predictions: list[tuple[str | None, Path]]
    others: dict[str, Path]
    overrides: tuple[Override, ...]
    picture: Path
    suffix: str
    json: Path | None
    force: bool
    trajectory: TrajectoryKind | None

    def check(self, inputs: list[Path]) -> None:
        """Check that the outputs can be written and are not inputs."""
        from know_cli.cli.report_file import check_report_path

        check_picture(self.picture, inputs, force=self.force)
        if self.json is not None:
            check_report_path(self.json, [*inputs, self.picture], "--json", force=self.force)


def trajectory(
    checkpoints: _Checkpoints,
    output: _Picture,
    trajectory: _Trajectory = None,
    last: _Last = None,
    every: _Every = None,
    prediction: _Prediction = None,
    other: _Other = None,
    kind: _Kind = None,
    json: _Json = None,
    force: _Force = False,
    quiet: _Quiet = False,
    no_progress: _NoProgress = False,
) -> None:
    """Draw checkpoints and predictions in the plane that shows their distances best.

    It is the plane of the first two principal axes of all drawn checkpoints, over the tensors that
    'know predict' predicts (kinds conv, fc and bias). The data is read once, block by block.
    """
    from know_cli.cli.report_file import takes_stdout, write_report

    talk = Output(quiet, aside=takes_stdout(json))
    own = _Own(checkpoints, trajectory, last, every)
    request = _request(own, output, prediction, other, kind, json, force, talk)
    from know_cli.files import write_bytes
    from know_cli.plots.points import describe
    from know_cli.plots.trajectory import draw_trajectory

    with _measured(request, talk, bar=not no_progress) as (points, names, plane):
        content = draw_trajectory(points.points, *plane.first_two, request.suffix)
        if json is not None:
            write_report(json, describe(points, names, plane), force=force)
        write_bytes(output, content, replace=force)
        talk.show(_table(points, plane), f"wrote {output}")


def landscape(
    checkpoints: _Checkpoints,
    output: _Picture,
    evaluate: Annotated[
        str,
        typer.Option(
            metavar="FUNCTION",
            show_default=False,
            help="Your function, module:function or file.py:function. It takes a state dict and "
            "returns a number, such as an accuracy or a loss.",
        ),
    ],
    trajectory: _Trajectory = None,
    last: _Last = None,
    every: _Every = None,
    prediction: _Prediction = None,
    other: _Other = None,
    grid: Annotated[
        int,
        typer.Option(
            metavar="N", min=_FEWEST_POINTS, max=_MOST_POINTS, help="Points along each axis."
        ),
    ] = 13,
    margin: Annotated[
        float,
        typer.Option(
            min=0.0, max=10.0, help="Margin around the checkpoints, as a share of their extent."
        ),
    ] = 0.2,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", show_default="the function's name", help="What the function measures."
        ),
    ] = None,
    kind: _Kind = None,
    json: _Json = None,
    force: _Force = False,
    quiet: _Quiet = False,
    no_progress: _NoProgress = False,
) -> None:
    """Draw contours of your own measure of weights in the plane of 'know plot trajectory'.

    Your function is called at N x N points of the plane. The weights of a point are a linear
    combination of the checkpoints; tensors that are not predicted, such as BatchNorm's running
    statistics, are the first checkpoint's.
    """
    from know_cli.cli.report_file import takes_stdout, write_report

    talk = Output(quiet, aside=takes_stdout(json))
    own = _Own(checkpoints, trajectory, last, every)
    request = _request(own, output, prediction, other, kind, json, force, talk)
    from know_cli.cli.progress import progress_for
    from know_cli.files import write_bytes
    from know_cli.plots import grid as work
    from know_cli.plots.landscape import draw_landscape
    from know_cli.plots.points import describe

    evaluation = work.load_evaluation(evaluate)
    with _measured(request, talk, bar=not no_progress) as (points, names, plane):
        places = work.grid_around(plane, grid, margin)
        with progress_for(talk, bar=not no_progress, unit="points") as progress:
            progress.phase("evaluating", grid * grid)
            values = work.evaluate_grid(
                places,
                lambda x, y: work.combine(points.checkpoints, names, plane.coefficients(x, y)),
                evaluation,
                progress.advance,
            )
        text = label or evaluate.rpartition(":")[2]
        content = draw_landscape(
            points.points, *plane.first_two, places, values, text, request.suffix
        )
        if json is not None:
            described = describe(points, names, plane)
            described |= work.describe(places, values, evaluate, text)
            write_report(json, described, force=force)
        write_bytes(output, content, replace=force)
        talk.show(f"{text}: {values.min():.4g} to {values.max():.4g}", f"wrote {output}")


def results(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS.json", show_default=False, help="The results of 'know eval'."
        ),
    ],
    output: _Picture,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="all",
            help="A task or a pattern such as 'fashion-*'; repeatable.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            show_default="continuation, retrodiction, shrink-0.9, average, and your bundles",
            help="A method or a pattern of its name in tables, such as '*norm copy'; repeatable.",
        ),
    ] = None,
    force: _Force = False,
    quiet: _Quiet = False,
) -> None:
    """Draw what predictions are worth, from x1 (no prediction) to x8, with 95 % intervals.

    One panel per task shows the paired difference from fine-tuning the first checkpoint itself,
    and as lines with bands what longer training and actually having more data bring. The last
    panel shows the mean recovered gain over the data-limited tasks.
    """
    talk = Output(quiet)
    suffix = check_picture(output, [file], force=force)
    from know_cli.plots.picture import require_matplotlib

    require_matplotlib()
    from know_cli.evaluation.results import read_results
    from know_cli.files import write_bytes
    from know_cli.plots.curves import curves_of
    from know_cli.plots.results import draw_results

    curves = curves_of(read_results(file), task or ["*"], method)
    write_bytes(output, draw_results(curves, suffix), replace=force)
    talk.show(f"wrote {output}")


COMMANDS = (
    ("trajectory", trajectory, "Checkpoints and predictions in a plane.", TRAJECTORY_EPILOG),
    ("landscape", landscape, "The same plane with contours of your measure.", LANDSCAPE_EPILOG),
    ("results", results, "The results of 'know eval' as curves.", RESULTS_EPILOG),
    ("choose", choice, "The candidates of 'know choose' with their intervals.", CHOICE_EPILOG),
)


@dataclass(frozen=True)
class _Own:
    """The trajectory's own checkpoints, as the command line names them."""

    checkpoints: list[str]
    trajectory: TrajectoryKind | None
    last: int | None
    every: int | None


def _request(
    own: _Own,
    output: Path,
    prediction: list[str] | None,
    other: list[str] | None,
    kind: list[str] | None,
    json: Path | None,
    force: bool,
    talk: Output,
) -> _Request:
    """Check everything that can be checked before torch is imported or a file is opened."""
    from know_cli.checkpoints.arguments import find_checkpoints
    from know_cli.checkpoints.paths import check_count, expand_arguments
    from know_cli.kinds import parse_override
    from know_cli.plots.picture import require_matplotlib

    suffix = check_picture(output, [], force=force)
    sessions, trajectory = find_checkpoints(
        own.checkpoints, own.trajectory, talk.notice, last=own.last, every=own.every
    )
    check_count(sessions, trajectory)
    named = parse_named(other or [], "--other", "FILE")
    others = {name: expand_arguments([path])[0] for name, path in named.items()}
    try:
        overrides = tuple(parse_override(text) for text in kind or ())
    except ValueError as error:
        raise UsageError(str(error)) from error
    request = _Request(
        sessions,
        _predictions(prediction or []),
        others,
        overrides,
        output,
        suffix,
        json,
        force,
        trajectory,
    )
    request.check([*sessions, *(path for _, path in request.predictions), *others.values()])
    require_matplotlib()
    return request


def _predictions(texts: list[str]) -> list[tuple[str | None, Path]]:
    """Parse ``[NAME=]FILE``; a text that is the path of a file is taken as one, even with =."""
    from know_cli.checkpoints.paths import expand_arguments
    from know_cli.errors import CheckpointError

    found: list[tuple[str | None, Path]] = []
    for text in texts:
        name, _, rest = text.partition("=")
        try:
            found += [(None, path) for path in expand_arguments([text])]
        except CheckpointError:
            if not (name and rest):
                raise
            found.append((name, expand_arguments([rest])[0]))
    return found


@contextmanager
def _measured(
    request: _Request, talk: Output, *, bar: bool
) -> Iterator[tuple[Points, list[str], Plane]]:
    """Open the checkpoints; yield them, the names of the tensors that count, and their plane."""
    from know_cli.cli.progress import progress_for
    from know_cli.plots.plane import inner_products, principal_axes
    from know_cli.plots.points import measured_tensors, open_points

    with open_points(
        request.sessions,
        request.predictions,
        request.others,
        request.overrides,
        request.trajectory,
    ) as points:
        request.check([file for each in points.checkpoints for file in each.headers])
        for notice in points.trajectory.notices:
            talk.notice(notice)
        names = measured_tensors(points.trajectory, request.overrides)
        with progress_for(talk, bar=bar) as progress:
            products = inner_products(points.checkpoints, names, progress)
        ends = [len(points.trajectory) - 1, 0]
        if points.trajectory.kind is TrajectoryKind.RUN:  # its latest checkpoint is the first
            ends.reverse()
        yield points, names, principal_axes(products, *ends)


def _table(points: Points, plane: Plane) -> Table:
    from know_cli.cli.tables import new_table

    coordinates, shares = plane.first_two
    axes = [f"axis {k} ({share:.1%})" for k, share in enumerate(shares, start=1)]
    table = new_table("checkpoint", *axes, "from the plane", "from Θ0")
    for k, point in enumerate(points.points):
        numbers = (*coordinates[k], plane.off_plane[k], plane.distances[0, k])
        table.add_row(point.name, *(f"{number:.4g}" for number in numbers))
    return table
