"""The paper's tables as rows of text, with what was measured here beside each figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from know_cli.evaluation.paper.tables import CONTROLS, PAPER_TABLES, QUOTED, Figure, PaperTable
from know_cli.evaluation.release.results import Standing, at_own_rate, at_tuned_rate
from know_cli.evaluation.runs.wording import difference_text, digits

NOT_RUN = "not run here"
CONTROLS_TEXT = (
    "KNOWN of here is the shipped family retrodiction, not the weights that the authors released. "
    f"Controls, which the paper has no figures of, are {', '.join(CONTROLS)}: Θ0 trained for as "
    "long as the forgetting takes, at the same rate and while it falls to 0; the most forgotten "
    "checkpoint; the mean of all; Θ0's weights halved; fresh weights."
)
COLUMNS = ("where", "start", "paper", "here, at the release's rate", "here, at the tuned rate")


def rows_of(table: PaperTable, tasks: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a table, one for each figure, with texts as :data:`COLUMNS`.

    Controls have rows of their own where one was measured, and a common one elsewhere.

    Args:
        table: of the paper.
        tasks: by name, what :func:`~know_cli.evaluation.release.results.to_json` returns of them.
    """
    for number, where in enumerate(table.columns):
        figures = [(name, of[number]) for name, of in table.rows]
        for name, figure in figures:
            yield where, name, figure.text, *_ours(figure, tasks)
        if not table.has_controls or not figures[0][1].task:
            continue
        controls = [replace(figures[0][1], text="", start=name) for name in CONTROLS]
        if not any(_cell(figure, tasks) for figure in controls):
            yield where, "controls", "", NOT_RUN, NOT_RUN
            continue
        for figure in controls:
            yield where, figure.start, "", *_ours(figure, tasks)


def _ours(figure: Figure, tasks: Mapping[str, Any]) -> tuple[str, str]:
    cell = _cell(figure, tasks)
    if cell is None:
        return (NOT_RUN, NOT_RUN) if figure.task else ("", "")
    scale = tasks[figure.task]["facts"]["measure"]["scale"]
    own, tuned = (way(cell).get(figure.start) for way in (at_own_rate, at_tuned_rate))
    return _text(own, scale), _text(tuned, scale)


def _cell(figure: Figure, tasks: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured in the condition of a figure; None if nothing was."""
    task = tasks.get(figure.task)
    if task is None:
        return None
    sizes = [one["size"] for one in task["definition"]["downstream"]]
    cell: Mapping[str, Any] | None = task["cells"].get(f"{max(sizes) * figure.share // 100} images")
    return cell if cell and figure.start in cell else None


def _text(standing: Standing | None, scale: float) -> str:
    if standing is None:
        return NOT_RUN
    text = f"{scale * standing.mean:.{digits(scale)}f}"
    if standing.difference is not None:
        text += f" ({difference_text(standing.difference, scale)})"
    return text


def to_markdown(tasks: Mapping[str, Any]) -> str:
    """A page of all tables.

    Args:
        tasks: by name, what was measured here; none for nothing.
    """
    lines = [
        "# The paper's tables",
        "",
        f"Written by `know eval --paper`. The paper's figures are {QUOTED}. Figures of here are "
        "means over the seeds, in brackets the difference from `naive` with its 95 % interval; "
        f"what no task has measured says so. {CONTROLS_TEXT}",
        "",
    ]
    for table in PAPER_TABLES:
        lines += [f"## {table.title}", "", f"{table.measure[0].upper()}{table.measure[1:]}."]
        if table.note:
            lines[-1] += f" {table.note}"
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows_of(table, tasks)]
        lines.append("")
    return "\n".join(lines)
