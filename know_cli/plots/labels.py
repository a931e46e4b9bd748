"""Labels beside points, placed so that they overlap neither each other nor the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

# Distances from the point to the nearest edge of its label, in units of the text's height.
_RADII = (0.55, 1.1, 1.8, 2.7, 3.8, 5.0)
# From this distance on, a line connects the label with its point.
_LEADER = 1.0
_DIRECTIONS = 16
# Costs of covering a label, a point, a line, or the outside of the axes, per area in units of the
# label's own. Distance costs little, so that it only decides between free places, and so does a
# connecting line that passes under another label, which stays readable.
_LABEL, _POINT, _LINE, _OUTSIDE, _DISTANCE, _CROSSED = 30.0, 20.0, 4.0, 100.0, 0.25, 0.5


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        """Its size."""
        return (self.right - self.left) * (self.top - self.bottom)

    def length_inside(self, start: Values, end: Values) -> float:
        """Length of the part of the segment from ``start`` to ``end``, each ``[2]``, inside."""
        entering, leaving = 0.0, 1.0
        (x, y), (to_x, to_y) = map(float, start), map(float, end)
        ways = ((x, to_x - x, self.left, self.right), (y, to_y - y, self.bottom, self.top))
        for begin, way, low, high in ways:
            if way == 0:
                if not low <= begin <= high:
                    return 0.0
                continue
            # Python's own numbers: along a way of next to nothing these are infinite, which is
            # right, and of which NumPy's numbers would warn.
            one, two = (low - begin) / way, (high - begin) / way
            entering, leaving = max(entering, min(one, two)), min(leaving, max(one, two))
        if leaving <= entering:
            return 0.0
        return (leaving - entering) * float(np.hypot(to_x - x, to_y - y))


def place_labels(
    points: Values,
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    segments: Sequence[tuple[Values, Values]],
    frame: Box,
) -> list[Box]:
    """Place each label beside its point, one after another.

    Args:
        points: ``[n, 2]`` in pixels.
        sizes: width and height of each label.
        obstacles: what labels should not cover, such as markers.
        segments: lines that labels should not cover.
        frame: within which labels should stay.

    Returns:
        The boxes of the labels, in their order.
    """
    placed: list[Box] = []
    leaders: list[tuple[Values, Values]] = []
    for point, size in zip(points, sizes, strict=True):
        best = min(
            _candidates(point, size),
            key=lambda pair: _cost(
                pair, point, size[1], placed, obstacles, [*segments, *leaders], frame
            ),
        )
        placed.append(best[1])
        if best[0] >= _LEADER:
            leaders.append((point, _nearest(best[1], point)))
    return placed


def _candidates(point: Values, size: tuple[float, float]) -> list[tuple[float, Box]]:
    """All places around a point as (distance in text heights, box), the nearest first."""
    width, height = size
    found = []
    for radius in _RADII:
        for number in range(_DIRECTIONS):
            # Starting at the upper right, where readers expect a label.
            angle = math.pi / 4 + 2 * math.pi * number / _DIRECTIONS
            x = point[0] + math.cos(angle) * (radius * height + width / 2)
            y = point[1] + math.sin(angle) * (radius * height + height / 2)
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            found.append((radius, box))
    return found


def _cost(
    candidate: tuple[float, Box],
    point: Values,
    height: float,
    placed: Sequence[Box],
    obstacles: Sequence[Box],
    segments: Sequence[tuple[Values, Values]],
    frame: Box,
) -> float:
    radius, box = candidate
    covered = _LABEL * sum(box.overlap(other) for other in placed)
    covered += _POINT * sum(box.overlap(other) for other in obstacles)
    covered += _LINE * height * sum(box.length_inside(*segment) for segment in segments)
    covered += _OUTSIDE * (box.area - box.overlap(frame))
    cost = covered / box.area + _DISTANCE * radius
    if radius >= _LEADER:
        end = _nearest(box, point)
        crossed = sum(other.length_inside(point, end) for other in placed)
        cost += _CROSSED * crossed / height
    return cost


def _nearest(box: Box, point: Values) -> Values:
    return np.array(
        [min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top)]
    )


def draw_labels(
    figure: Figure,
    axes: Axes,
    points: Values,
    texts: Sequence[str],
    segments: Sequence[tuple[Values, Values]],
    *,
    marker: float,
) -> None:
    """Write a text beside each point, with a thin line to the point if it is farther away.

    The axes have to be in their final place and size.

    Args:
        figure: with the axes.
        axes: gets the labels.
        points: ``[n, 2]`` in data coordinates.
        texts: one per point.
        segments: lines that were drawn, in data coordinates.
        marker: diameter of the points' markers, in typographic points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke

    to_pixels = axes.transData.transform
    pixels = np.asarray(to_pixels(points), np.float64)
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    sizes = []
    for text in texts:
        drawn = axes.text(0, 0, text)
        extent = drawn.get_window_extent(renderer)
        sizes.append((extent.width, extent.height))
        drawn.remove()
    radius = marker * figure.dpi / 72 / 2
    around = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in pixels]
    window = axes.get_window_extent(renderer)
    frame = Box(window.x0 + radius, window.y0 + radius, window.x1 - radius, window.y1 - radius)
    lines = [(np.asarray(to_pixels(a)), np.asarray(to_pixels(b))) for a, b in segments]
    boxes = place_labels(pixels, sizes, around, lines, frame)
    halo = [withStroke(linewidth=2, foreground="white")]
    for text, point, size, box in zip(texts, pixels, sizes, boxes, strict=True):
        end = _nearest(box, point)
        if float(np.hypot(*(end - point))) > _LEADER * size[1]:
            back = axes.transData.inverted().transform([point, end])
            axes.plot(back[:, 0], back[:, 1], color="0.4", linewidth=0.5, zorder=2.5)
        x, y = axes.transData.inverted().transform(
            [(box.left + box.right) / 2, (box.bottom + box.top) / 2]
        )
        axes.text(x, y, text, ha="center", va="center", path_effects=halo, zorder=6)
