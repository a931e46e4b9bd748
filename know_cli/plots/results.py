"""The picture of an evaluation's results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from know_cli.checkpoints.paths import factor_name
from know_cli.evaluation.anchors import LONGER, ORACLE
from know_cli.plots.curves import Curve, Curves, Panel
from know_cli.plots.picture import look, render, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (2.35, 1.95)
_SINGLE = (3.4, 2.4)
_LEGEND_ROW = 0.2
# At each step, curves are drawn side by side so that their intervals can be distinguished;
# together they take this share of the distance to the next step.
_SPREAD = 0.5
_LEVELS: dict[str, dict[str, Any]] = {
    LONGER: {
        "line": (0, (1, 2)),
        "colour": "0.35",
        "band": {"hatch": "////", "facecolor": "none", "zorder": 0.6},
    },
    ORACLE: {"line": "-", "colour": "0.55", "band": {"facecolor": "0.9", "zorder": 0.5}},
}


def draw_results(curves: Curves, suffix: str) -> bytes:
    """Draw one panel per task, and one of the recovered gain if there is a summary.

    Args:
        curves: to draw.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The file's content.
    """
    from matplotlib.figure import Figure

    panels = [*curves.tasks, *([curves.summary] if curves.summary else [])]
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    with style():
        width, height = _SINGLE if len(panels) == 1 else (_PANEL[0] * columns, _PANEL[1] * rows)
        figure = Figure(figsize=(width, height), layout="constrained")
        handles: dict[str, Any] = {}
        for number, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, number)
            handles |= _draw_panel(axes, panel, curves)
        order = [name for name in (*curves.names, *_LEVELS) if name in handles]
        title = "mean and 95 % interval over seeds"
        if curves.summary:
            title += "\n(of recovered gain: over tasks)"
        ordered = {name: handles[name] for name in order}
        _draw_legend(figure, ordered, title, rows, columns, len(panels))
        return render(figure, suffix)


def _draw_legend(
    figure: Figure, handles: dict[str, Any], title: str, rows: int, columns: int, panels: int
) -> None:
    """Draw the legend where panels leave room, or else below all of them."""
    manner: dict[str, Any] = {"frameon": False, "handlelength": 3.2, "title": title}
    free = rows * columns - panels
    if free:
        axes = figure.add_subplot(rows, columns, (panels + 1, rows * columns))
        axes.axis("off")
        axes.legend(
            handles.values(), handles.keys(), loc="center", ncols=free, labelspacing=0.8, **manner
        )
        return
    count = max(2, 2 * columns - 1)
    size = figure.get_size_inches()
    lines = len(title.splitlines()) + math.ceil(len(handles) / count)
    figure.set_size_inches(size[0], size[1] + _LEGEND_ROW * lines)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=count, **manner
    )


def _columns(panels: int) -> int:
    """Number of columns, for a page at least as wide as it is high."""
    if panels in (1, 2, 4):
        return min(panels, 2)
    return 3 if panels <= 9 else 4


def _draw_panel(axes: Axes, panel: Panel, curves: Curves) -> dict[str, Any]:
    """Draw a panel; return the handle of each name for the legend."""
    axes.set_title(f"{panel.title}\n({panel.worth})", fontsize=7.5)
    axes.set_ylabel(panel.quantity, fontsize=7)
    axes.axhline(0, color="black", linewidth=0.5, zorder=1)
    axes.tick_params(width=0.5)
    handles = {name: _draw_level(axes, panel, name) for name in panel.levels}
    for curve in panel.curves:
        number = curves.names.index(curve.name)
        handles[curve.name] = _draw_curve(axes, curve, number, len(curves.names))
    steps = sorted({0, *(step for curve in panel.curves for step in curve.estimates)})
    # A step multiplies the data by 1/rate, so steps are evenly spaced on a logarithmic axis.
    axes.set_xticks(steps, [factor_name(curves.rate, step).replace("x", "×") for step in steps])
    axes.set_xlim(steps[0] - 0.3, steps[-1] + 0.5)
    return handles


def _draw_level(axes: Axes, panel: Panel, name: str) -> Any:
    estimate, drawn = panel.levels[name], _LEVELS[name]
    line = axes.axhline(
        estimate.value, color=drawn["colour"], linestyle=drawn["line"], linewidth=1.2, zorder=1.5
    )
    if not math.isfinite(estimate.low):
        return line
    band = axes.axhspan(estimate.low, estimate.high, edgecolor="0.75", linewidth=0, **drawn["band"])
    return (band, line)


def _draw_curve(axes: Axes, curve: Curve, number: int, count: int) -> Any:
    drawn = look(number)
    offset = _SPREAD * ((number + 0.5) / count - 0.5)
    steps = list(curve.estimates)
    # All curves start at the same point, Θ0 itself, which has no marker.
    places = [step + (offset if step else 0) for step in steps]
    estimates = [curve.estimates[step] for step in steps]
    below = [e.value - e.low if step else math.nan for step, e in curve.estimates.items()]
    above = [e.high - e.value if step else math.nan for step, e in curve.estimates.items()]
    return axes.errorbar(
        places,
        [estimate.value for estimate in estimates],
        yerr=(below, above),
        markevery=slice(1, None),
        elinewidth=0.8,
        capsize=1.5,
        capthick=0.8,
        markersize=4,
        markeredgecolor="black",
        markeredgewidth=0.4,
        zorder=3,
        **drawn,
    )
