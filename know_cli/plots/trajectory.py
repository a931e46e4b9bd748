"""The picture of a trajectory in the plane of its first two principal axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from know_cli.plots.labels import draw_labels
from know_cli.plots.picture import look, render, style
from know_cli.plots.points import Point, Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
Segments = list[tuple[Values, Values]]

_MARKER = 5.5
_WIDTH = 5.2
# Inches for legend and axis labels below the plane; lowest and highest ratio of the plane's
# height to its width.
_BELOW, _LOWEST, _HIGHEST = 1.0, 0.4, 0.8


def draw_trajectory(
    points: Sequence[Point], coordinates: Values, shares: Values, suffix: str
) -> bytes:
    """Draw sessions as a path, with predictions and other checkpoints.

    Args:
        points: N of them, the trajectory's own first, in order.
        coordinates: ``[N, 2]``.
        shares: ``[2]``, of the two axes, 0 to 1.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The file's content.
    """
    from matplotlib.figure import Figure

    with style():
        width, height = np.ptp(coordinates, axis=0)
        ratio = min(max(float(height / width), _LOWEST), _HIGHEST)
        figure = Figure(figsize=(_WIDTH, _WIDTH * ratio + _BELOW), layout="constrained")
        axes = figure.add_subplot()
        # Equal scales keep the lengths and angles between weights, as far as the plane shows them.
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.08)
        axes.tick_params(direction="in", top=True, right=True)
        draw_points(figure, axes, points, coordinates, shares)
        return render(figure, suffix)


def draw_points(
    figure: Figure, axes: Axes, points: Sequence[Point], coordinates: Values, shares: Values
) -> None:
    """Draw paths, markers, legend and labels of checkpoints; call this last.

    Args:
        figure: with the axes.
        axes: to draw in; their position is final afterwards.
        points: N of them, the trajectory's own first, in order.
        coordinates: ``[N, 2]``.
        shares: ``[2]``, of the two axes, 0 to 1.
    """
    for name, number in ((axes.set_xlabel, 0), (axes.set_ylabel, 1)):
        name(f"principal axis {number + 1} ({100 * shares[number]:.1f} % of squared distances)")
    segments = _draw_own(axes, points, coordinates)
    rest = dict.fromkeys(point.series for point in points if not point.role.is_of_trajectory)
    for number, series in enumerate(rest, start=1):
        members = [
            k
            for k, point in enumerate(points)
            if point.series == series and not point.role.is_of_trajectory
        ]
        if points[members[0]].role is Role.PREDICTION:
            segments += _draw_series(axes, coordinates[[0, *members]], number, series)
        else:
            _draw_markers(
                axes, coordinates[members], look(number)["marker"], "white", "black", None
            )
    if any(point.role is Role.PREDICTION for point in points):
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.draw_without_rendering()
    # Labels are placed around everything else, which must not move any more.
    figure.set_layout_engine("none")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    texts = [point.label for point in points]
    draw_labels(figure, axes, coordinates, texts, segments, marker=_MARKER)


def _draw_own(axes: Axes, points: Sequence[Point], coordinates: Values) -> Segments:
    """Draw a trajectory's own checkpoints; arrows point from what was trained to what it became."""
    path = coordinates[[k for k, point in enumerate(points) if point.role.is_of_trajectory]]
    first, last = points[0].label, points[len(path) - 1].label
    if points[0].role is Role.CHECKPOINT:  # the latest comes first
        segments, text = list(pairwise(path[::-1])), f"run, {last} to {first}"
    elif points[0].role is Role.BRANCH:
        segments, text = [(path[0], end) for end in path[1:]], f"branches of {first}"
    else:
        segments, text = list(pairwise(path)), f"sessions, {first} to {last}"
    for start, end in segments:
        _arrow(axes, start, end, "black", "-")
    _draw_markers(axes, path, look(0)["marker"], "black", "white", text)
    return segments


def _draw_series(axes: Axes, path: Values, number: int, series: str) -> Segments:
    """Draw one method's predictions step by step from Θ0, the first point of the path."""
    drawn = look(number)
    segments = list(pairwise(path))
    for start, end in segments:
        _arrow(axes, start, end, drawn["color"], drawn["linestyle"])
    _draw_markers(
        axes, path[1:], drawn["marker"], drawn["color"], "white", f"predicted by {series}"
    )
    return segments


def _draw_markers(
    axes: Axes, places: Values, marker: str, face: str, edge: str, text: str | None
) -> None:
    axes.plot(
        places[:, 0],
        places[:, 1],
        linestyle="",
        marker=marker,
        markersize=_MARKER,
        color=face,
        markeredgecolor=edge,
        markeredgewidth=0.7,
        zorder=4,
        label=text,
    )


def _arrow(axes: Axes, start: Values, end: Values, colour: str, line: Any) -> None:
    axes.annotate(
        "",
        xy=(float(end[0]), float(end[1])),
        xytext=(float(start[0]), float(start[1])),
        arrowprops={
            "arrowstyle": "-|>,head_width=0.16,head_length=0.4",
            "color": colour,
            "linewidth": 1.0,
            "linestyle": line,
            "shrinkA": 0,
            "shrinkB": _MARKER / 2,
        },
        zorder=3,
    )
