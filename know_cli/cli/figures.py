"""KNOWN's figures as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from know_cli.cli.tables import new_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.meta.held_out import Table
    from know_cli.meta.scores import Figures

_HEADING = (
    "mean|prediction − target| over mean|θ0 − target| on held-out trajectories: 1 is no change, "
    "less is better"
)
_COLUMNS = (
    "held out", "kind", "step", "trajectories", "windows", "KNOWN", "improved",
)  # fmt: skip
_RIVALS = ("λ·θ0 (λ)", "θ0 + α(θ0 − θ1) (α)", "average", "linear")


def figures_tables(tables: Mapping[str, Table], *, short: bool = False) -> Iterator[RenderableType]:
    """One table a bundle for the terminal.

    Args:
        tables: by title.
        short: only the first group, that of the trajectories most like those trained on.
    """
    yield _HEADING
    for title, table in tables.items():
        names = _others(table)
        drawn = new_table(*_COLUMNS, *names, *_RIVALS)
        for cells in _rows(table, names, short=short):
            drawn.add_row(*cells)
        yield f"\n{title}"
        yield drawn


def figures_markdown(tables: Mapping[str, Table]) -> str:
    """One section with a table a bundle in Markdown, for the model card.

    A row has the figures after one, two, three … steps beside each other.
    """
    lines = [f"{_HEADING}. After one, two, three steps.", ""]
    for title, table in tables.items():
        names = _others(table)
        columns = [name for name in _COLUMNS if name != "step"] + [*names, *_RIVALS]
        lines += [f"### {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(cells)} |" for cells in _joined_rows(table, names)]
        lines.append("")
    return "\n".join(lines)


def _joined_rows(table: Table, names: list[str]) -> Iterator[list[str]]:
    for group, kinds in table.items():
        for kind, steps in kinds.items():
            cells = zip(*(_cells(figures, names) for figures in steps.values()), strict=True)
            yield [group, kind.value, *(" / ".join(cell) for cell in cells)]


def _others(table: Table) -> list[str]:
    """Names of the further KNOWN that were measured."""
    found = {
        name: None
        for kinds in table.values()
        for steps in kinds.values()
        for figures in steps.values()
        for name in figures.others
    }
    return list(found)


def _rows(table: Table, names: list[str], *, short: bool = False) -> Iterator[list[str]]:
    for group, kinds in list(table.items())[: 1 if short else None]:
        for kind, steps in kinds.items():
            for step, figures in steps.items():
                yield [group, kind.value, str(step), *_cells(figures, names)]


def _cells(figures: Figures, names: list[str]) -> list[str]:
    return [
        f"{figures.trajectories}",
        f"{figures.rows:,}",
        f"{figures.known:.3f}",
        f"{figures.better:.0%}",
        *(f"{figures.others[name]:.3f}" if name in figures.others else "-" for name in names),
        f"{figures.multiplier:.3f} ({figures.multiplier_value:.3f})",
        f"{figures.extrapolation:.3f} ({figures.extrapolation_value:+.2f})",
        f"{figures.average:.3f}",
        f"{figures.least_squares:.3f}",
    ]
