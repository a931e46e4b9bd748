"""The picture of a measure over the plane of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from know_cli.plots.grid import Grid
from know_cli.plots.picture import render, style
from know_cli.plots.points import Point
from know_cli.plots.trajectory import draw_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.text import Text

Values = NDArray[np.float64]

_WIDTH = 5.2
# Space for legend, colour bar and axis labels around the plane, in inches.
_BESIDE, _BELOW = 1.2, 1.0
_LEVELS = 10
# Least distance between the number on a contour and a checkpoint, in pixels.
_MARGIN = 10


def draw_landscape(
    points: Sequence[Point],
    coordinates: Values,
    shares: Values,
    grid: Grid,
    values: Values,
    label: str,
    suffix: str,
) -> bytes:
    """Draw contours, with a trajectory and predictions on top.

    Args:
        points: N of them, the trajectory's own first, in order.
        coordinates: ``[N, 2]``.
        shares: ``[2]``, of the two axes, 0 to 1.
        grid: where the measure was evaluated.
        values: ``[len(grid.y), len(grid.x)]``.
        label: what is measured.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The file's content.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style():
        ratio = float((grid.y[-1] - grid.y[0]) / (grid.x[-1] - grid.x[0]))
        height = (_WIDTH - _BESIDE) * ratio + _BELOW
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_aspect("equal")
        axes.set(xlim=(grid.x[0], grid.x[-1]), ylim=(grid.y[0], grid.y[-1]))
        levels = MaxNLocator(_LEVELS).tick_values(*_range(values))
        filled = axes.contourf(grid.x, grid.y, values, levels=levels, cmap=_light())
        lines = axes.contour(
            grid.x, grid.y, values, levels=levels, colors="0.25", linewidths=0.5, linestyles="-"
        )
        numbers = axes.clabel(lines, fontsize=6, inline_spacing=2)
        figure.colorbar(filled, cax=axes.inset_axes((1.03, 0, 0.03, 1)), label=label)
        draw_points(figure, axes, points, coordinates, shares)
        _drop_covered(axes, numbers, coordinates)
        return render(figure, suffix)


def _drop_covered(axes: Axes, numbers: Sequence[Text], coordinates: Values) -> None:
    """Remove contour numbers that the frame or a checkpoint cuts: half a number misleads."""
    frame = axes.get_window_extent()
    points = axes.transData.transform(coordinates)
    for number in numbers:
        extent = number.get_window_extent()
        inside = frame.contains(*extent.min) and frame.contains(*extent.max)
        if not inside or extent.padded(_MARGIN).count_contains(points):
            number.remove()


def _range(values: Values) -> tuple[float, float]:
    """Lowest and highest value, widened if all are the same."""
    low, high = float(values.min()), float(values.max())
    apart = max(abs(low), 1.0) * 1e-6
    return (low, high) if high - low > apart else (low - apart, high + apart)


def _light() -> Colormap:
    """Colours on which black can be read, darker with every step, also in greyscale."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    blues = matplotlib.colormaps["YlGnBu"]
    return LinearSegmentedColormap.from_list("light", blues(np.linspace(0.0, 0.55, 64)))
