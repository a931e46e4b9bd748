"""KNOWN's scores as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from know_cli.cli.tables import new_table
from know_cli.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.meta.held_out import Table
    from know_cli.meta.scores import Scores

_HEADING = (
    "mean|prediction − target| over mean|θ0 − target| on held-out trajectories: 1 is no change, "
    "less is better"
)
_COLUMNS = (
    "held out", "kind", "step", "trajectories", "windows", "KNOWN", "improved",
)  # fmt: skip
_BASELINES = ("λ·θ0 (λ)", "θ0 + α(θ0 − θ1) (α)", "average", "linear")


def score_tables(tables: Mapping[str, Table], *, short: bool = False) -> Iterator[RenderableType]:
    """Yield a heading, then one table per bundle, for the terminal.

    Args:
        tables: by title.
        short: only the first group, of the trajectories most similar to the training ones.
    """
    yield _HEADING
    for title, table in tables.items():
        names = _others(table)
        drawn = new_table(*_COLUMNS, *names, *_BASELINES)
        for cells in _rows(table, names, short=short):
            drawn.add_row(*cells)
        yield ""
        yield title
        yield drawn


def scores_markdown(tables: Mapping[str, Table]) -> str:
    """Markdown with one section and table per bundle, for the model card.

    Each cell has the scores after one, two, three … steps.
    """
    tables = {printable(title): table for title, table in tables.items()}
    lines = [f"{_HEADING}. After one, two, three steps.", ""]
    for title, table in tables.items():
        names = _others(table)
        shown = [printable(name) for name in names]
        columns = [name for name in _COLUMNS if name != "step"] + [*shown, *_BASELINES]
        lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cells)} |" for cells in _joined_rows(table, names)]
        lines.append("")
    return "\n".join(lines)


def _joined_rows(table: Table, names: list[str]) -> Iterator[list[str]]:
    for group, kinds in table.items():
        for kind, steps in kinds.items():
            cells = zip(*(_cells(scores, names) for scores in steps.values()), strict=True)
            yield [group, kind.value, *(" / ".join(cell) for cell in cells)]


def _others(table: Table) -> list[str]:
    """Names of the other KNOWN that were measured."""
    found = {
        name: None
        for kinds in table.values()
        for steps in kinds.values()
        for scores in steps.values()
        for name in scores.others
    }
    return list(found)


def _rows(table: Table, names: list[str], *, short: bool = False) -> Iterator[list[str]]:
    for group, kinds in list(table.items())[: 1 if short else None]:
        for kind, steps in kinds.items():
            for step, scores in steps.items():
                yield [group, kind.value, str(step), *_cells(scores, names)]


def _cells(scores: Scores, names: list[str]) -> list[str]:
    return [
        f"{scores.trajectories}",
        f"{scores.rows:,}",
        f"{scores.known:.3f}",
        f"{scores.better:.0%}",
        *(f"{scores.others[name]:.3f}" if name in scores.others else "-" for name in names),
        f"{scores.multiplier:.3f} ({scores.multiplier_value:.3f})",
        f"{scores.extrapolation:.3f} ({scores.extrapolation_value:+.2f})",
        f"{scores.average:.3f}",
        f"{scores.least_squares:.3f}",
    ]
