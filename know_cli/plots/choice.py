"""The picture of a search: every candidate's difference to Θ0 with its interval, in order."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from know_cli.choosing.intervals import LARGEST, Difference, difference
from know_cli.choosing.search import BASE, RANDOM
from know_cli.errors import UsageError, quoted
from know_cli.files import read_text
from know_cli.plots.picture import COLOURS, render, style

#: Name of the report that ``know choose`` leaves in its folder.
REPORT = "report.json"

_WIDTH, _ROW, _AROUND = 4.6, 0.17, 0.85
_CHOOSING, _CONFIRMED, _CONTROL = COLOURS[1], COLOURS[4], "0.45"


@dataclass(frozen=True)
class Row:
    """One line of the picture.

    Attributes:
        name: of the candidate, with its best tuned values.
        found: its paired difference to Θ0, in the measure's own direction; None if a measure of it
            failed, or it was never measured.
        is_winner: whether it was the best in choosing.
    """

    name: str
    found: Difference | None
    is_winner: bool = False


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        rows: of each candidate what choosing said, the best first, those that failed last.
        confirmed: the winner's difference on fresh seeds; None without a winner.
        control: the random direction's on fresh seeds.
        is_better: whether the winner was written.
        minimise: whether smaller is better.
        base: name of Θ0 with its best tuned values.
    """

    rows: tuple[Row, ...]
    confirmed: Difference | None
    control: Difference | None
    is_better: bool
    minimise: bool
    base: str


def read_choice(path: Path) -> Choice:
    """Read the report of ``know choose``.

    Args:
        path: of the report, or of the folder that the search keeps.

    Raises:
        UsageError: it is missing, or is none.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        return choice_of(json.loads(read_text(file)))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"{file}: is not a report of 'know choose' ({type(error).__name__}: {error})"
        ) from error


def choice_of(report: Mapping[str, Any]) -> Choice:
    """Of a report's content, each candidate at the tuned values that got furthest.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: it is none.
    """
    minimise = bool(report["minimise"])
    sign = -1 if minimise else 1
    entries: list[Mapping[str, Any]] = report["candidates"]
    bases = [e for e in entries if e["start"] == BASE and _name(e) == report["base"]]
    if not bases:
        raise ValueError(f"its base {quoted(report['base'])} is none of its candidates")
    base = bases[0]
    measured = {seed: _number(value) for seed, value in base["results"].items()}
    best: dict[str, Row] = {}
    for entry in entries:  # the longest measured and best first
        if entry["start"] == BASE:
            continue
        results = {seed: _number(value) for seed, value in entry["results"].items()}
        shared = sorted(results.keys() & measured.keys())
        found = None
        if not entry["failed"] and shared:
            found = difference([results[seed] - measured[seed] for seed in shared])
        name = _name(entry)
        if entry["start"] not in best or best[entry["start"]].found is None:
            best[entry["start"]] = Row(name, found, name == report["winner"])
    ordered = sorted(
        best.values(), key=lambda r: math.inf if r.found is None else -sign * r.found.mean
    )
    return Choice(
        tuple(ordered),
        _difference(report["confirmed"]),
        _difference(report["random_direction"]),
        bool(report["is_better"]),
        minimise,
        str(report["base"]),
    )


def _name(entry: Mapping[str, Any]) -> str:
    return " ".join([entry["start"], *(f"{k}={v}" for k, v in entry["values"].items())])


def _difference(found: Mapping[str, Any] | None) -> Difference | None:
    if found is None:
        return None
    low, high = found["low"], found["high"]
    return Difference(
        int(found["pairs"]),
        _number(found["mean"]),
        -math.inf if low is None else _number(low),
        math.inf if high is None else _number(high),
        math.nan,
    )


def _number(value: Any) -> float:
    """A number that can be compared and drawn."""
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{quoted(value)} is no measure")
    return number


def draw_choice(choice: Choice, suffix: str) -> bytes:
    """Draw a search.

    Args:
        choice: what was found.
        suffix: ``.png`` or ``.svg``.

    Returns:
        The file's content.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines: list[tuple[str, Difference | None, str, str]] = []
    for row in choice.rows:
        lines.append((row.name, row.found, _CHOOSING, "o"))
        if row.is_winner and choice.confirmed is not None:
            lines.append((f"confirmed: {_verdict(choice)}", choice.confirmed, _CONFIRMED, "D"))
    if choice.control is not None:
        lines.append((f"{RANDOM} of that length", choice.control, _CONTROL, "s"))
    left, right = _range([found for _, found, *_ in lines if found is not None])
    with style():
        figure = Figure(figsize=(_WIDTH, _ROW * len(lines) + _AROUND), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="black", linewidth=0.8, zorder=1)
        for place, (_, found, colour, marker) in enumerate(lines):
            if found is None:
                axes.annotate(
                    "failed", (0, place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=7, color="0.3",
                )  # fmt: skip
                continue
            for end, limit, marker_of_end in ((found.low, left, "<"), (found.high, right, ">")):
                if not math.isfinite(end):
                    continue
                to = max(left, min(right, end))
                axes.plot([found.mean, to], [place, place], color=colour, linewidth=1.3)
                if to != end:  # it goes on beyond the picture
                    axes.plot(
                        [limit], [place], marker=marker_of_end, color=colour, markersize=3.5,
                        linestyle="none", clip_on=False,
                    )  # fmt: skip
            axes.plot(
                [found.mean], [place], marker=marker, color=colour, markersize=4.2,
                markeredgecolor="black", markeredgewidth=0.4, linestyle="none", zorder=3,
            )  # fmt: skip
            axes.annotate(
                f"{found.pairs}", (1, place), xycoords=("axes fraction", "data"),
                xytext=(8, 0), textcoords="offset points", va="center", fontsize=6.5, color="0.35",
            )  # fmt: skip
        axes.set_yticks(range(len(lines)), [text for text, *_ in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(left, right)
        axes.tick_params(width=0.5)
        for label, (_, _, colour, _) in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_color("black" if colour == _CHOOSING else colour)
        better = "smaller" if choice.minimise else "larger"
        axes.set_xlabel(
            f"difference to {choice.base.replace(BASE, 'Θ0', 1)}, paired by seed ({better} is "
            "better)\non the right: number of seeds"
        )
        kinds = [("in choosing", _CHOOSING, "o"), ("on fresh seeds", _CONFIRMED, "D")]
        handles = [
            Line2D([], [], color=c, marker=m, markersize=4.2, markeredgecolor="black",
                   markeredgewidth=0.4, label=f"{text}, 95 %")
            for text, c, m in kinds[: 1 + (choice.confirmed is not None)]
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
        return render(figure, suffix)


def _verdict(choice: Choice) -> str:
    """What the fresh seeds say of the winner, in words."""
    if choice.is_better:
        return "better"
    is_told = choice.confirmed is not None and not choice.confirmed.includes_zero
    return "worse" if is_told else "not told from Θ0"


def _range(found: list[Difference]) -> tuple[float, float]:
    """What of the axis is drawn: all means, and the intervals that more than two seeds give.

    Those of two seeds are wider than all else by a factor of ten or more.
    """
    ends = [0.0, *(one.mean for one in found)]
    ends += [end for one in found if one.pairs > 2 for end in (one.low, one.high)]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin
