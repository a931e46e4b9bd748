"""What the pictures of checkpoints have in common: the request, the points and their plane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.options import parse_named
from know_cli.cli.output import Output
from know_cli.cli.picture_file import check_picture
from know_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.kinds import Override
    from know_cli.plots.grid import Evaluation
    from know_cli.plots.plane import Plane
    from know_cli.plots.points import Points


@dataclass(frozen=True)
class PlotRequest:
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
    temporary: Path | None = None

    def check(self, inputs: list[Path]) -> None:
        """Check that the outputs can be written and are not inputs."""
        from know_cli.cli.report_file import check_report_path

        check_picture(self.picture, inputs, force=self.force)
        if self.json is not None:
            check_report_path(self.json, [*inputs, self.picture], "--json", force=self.force)


@dataclass(frozen=True)
class Own:
    """The trajectory's own checkpoints, as the command line names them."""

    checkpoints: list[str]
    trajectory: TrajectoryKind | None
    last: int | None
    every: int | None


def plot_request(
    own: Own,
    output: Path,
    prediction: list[str] | None,
    other: list[str] | None,
    kind: list[str] | None,
    json: Path | None,
    force: bool,
    talk: Output,
) -> PlotRequest:
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
    request = PlotRequest(
        sessions,
        _parse_predictions(prediction or []),
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


def _parse_predictions(texts: list[str]) -> list[tuple[str | None, Path]]:
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
def measured_points(
    request: PlotRequest, talk: Output, *, bar: bool
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


def points_table(points: Points, plane: Plane) -> Table:
    """Where each checkpoint lies, and how far from the plane and from Θ0."""
    from know_cli.cli.tables import new_table

    coordinates, shares = plane.first_two
    axes = [f"axis {k} ({share:.1%})" for k, share in enumerate(shares, start=1)]
    table = new_table("checkpoint", *axes, "from the plane", "from Θ0")
    for k, point in enumerate(points.points):
        numbers = (*coordinates[k], plane.off_plane[k], plane.distances[0, k])
        table.add_row(point.name, *(f"{number:.4g}" for number in numbers))
    return table


def draw_landscape_of(
    request: PlotRequest,
    talk: Output,
    evaluation: Evaluation,
    label: str,
    *,
    grid: int,
    margin: float,
    bar: bool,
) -> None:
    """Evaluate weights over the plane of a request's checkpoints, and write the picture.

    Args:
        request: what to draw, and where.
        talk: to the user.
        evaluation: measures weights.
        label: what it measures.
        grid: points along each axis.
        margin: around the checkpoints, as a share of their extent.
        bar: whether progress is shown.

    Raises:
        KnowError: a checkpoint cannot be used, the measure fails, or a file cannot be written.
    """
    from know_cli.cli.progress import progress_for
    from know_cli.cli.report_file import write_report
    from know_cli.files import write_bytes
    from know_cli.plots import grid as work
    from know_cli.plots.landscape import draw_landscape
    from know_cli.plots.points import describe

    with measured_points(request, talk, bar=bar) as (points, names, plane):
        places = work.grid_around(plane, grid, margin)
        with progress_for(talk, bar=bar, unit="points") as progress:
            progress.phase("evaluating", grid * grid)
            values = work.evaluate_grid(
                places,
                lambda x, y: work.combine(points.checkpoints, names, plane.coefficients(x, y)),
                evaluation,
                progress.advance,
            )
        content = draw_landscape(
            points.points, *plane.first_two, places, values, label, request.suffix
        )
        if request.json is not None:
            described = describe(points, names, plane, request.temporary)
            described |= work.describe(places, values, evaluation.name, label)
            write_report(request.json, described, force=request.force)
        write_bytes(request.picture, content, replace=request.force)
        talk.show(f"{label}: {values.min():.4g} to {values.max():.4g}", f"wrote {request.picture}")
