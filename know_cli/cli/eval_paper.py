"""``know eval --paper``: the paper's tables, with what was measured here beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from know_cli.cli.eval_options import refuse_others
from know_cli.errors import UsageError

if TYPE_CHECKING:
    from know_cli.cli.output import Output

# Parameters that have an effect.
_OWN = {"paper", "output", "data_folder", "dry_run", "table", "force", "quiet"}


def check_paper(context: typer.Context) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: the reason.
    """
    refuse_others(context, _OWN, "--paper")


def show_paper(
    talk: Output,
    *,
    folder: Path | None,
    data_folder: Path | None,
    dry_run: bool,
    table: Path | None,
    force: bool,
) -> None:
    """Show the paper's tables, or what its experiments take.

    Args:
        talk: to the user.
        folder: where ``know eval --regime release`` wrote its results, or a folder of such
            folders; None for none.
        data_folder: where the data sets' files are.
        dry_run: show what the experiments take instead.
        table: for all tables as Markdown; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        UsageError: the folder has no such results.
        OutputError: the page cannot be written.
    """
    from know_cli.cli.report_file import write_out
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.paper.page import COLUMNS, CONTROLS_TEXT, rows_of, to_markdown
    from know_cli.evaluation.paper.tables import PAPER_TABLES, QUOTED
    from know_cli.evaluation.release.results import read_release

    if dry_run:
        _show_experiments(talk, data_folder)
        return
    tasks: dict[str, Any] = {}
    for path in [] if folder is None else _results(folder):
        tasks = {**read_release(path)["tasks"], **tasks}
    for paper in PAPER_TABLES:
        shown = new_table(*COLUMNS)
        for row in rows_of(paper, tasks):
            shown.add_row(*row)
        talk.show("", f"{paper.title}: {paper.measure}", shown)
        if paper.note:
            talk.show(paper.note)
    talk.show("", f"The paper's figures are {QUOTED}. {CONTROLS_TEXT}")
    if table is not None:
        write_out(table, to_markdown(tasks), force=force)
        talk.show(f"wrote {'the tables' if talk.aside else table}")


def _results(folder: Path) -> list[Path]:
    """The results in a folder, then those in its folders; of one task the first count.

    Raises:
        UsageError: there are none.
    """
    from know_cli.cli.eval_release import RESULTS

    found = [
        path for path in (folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}"))) if path.exists()
    ]
    if not found:
        raise UsageError(
            f"{folder}: has no {RESULTS}, and no folder that has; name one that 'know eval "
            "--regime release' wrote into, or leave -o out"
        )
    return found


def _show_experiments(talk: Output, data_folder: Path | None) -> None:
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.paper.plan import experiments
    from know_cli.evaluation.release.cost import measured

    table = new_table("task", "data", "here", "pre-trained on", "fine-tuned on", "hours")
    total = 0.0
    for one in experiments(data_folder):
        hours = "not known"
        if one.hours is not None:
            hours = f"{one.hours:,.0f}"
            total += one.hours
        table.add_row(
            one.task,
            ", ".join(one.data_sets),
            "no" if one.lacking else "yes",
            f"{one.pretrained:,}",
            " ".join(f"{size:,}" for size in one.fine_tuned),
            hours,
        )
    talk.show(
        "nothing is computed; a task runs with 'know eval --regime release --task TASK':", table
    )
    talk.show(
        "",
        f"Hours are of one core of {measured().processor}, for one seed with every "
        "start (BatchNorm fresh; its other treatments cost half as much again) in all conditions, "
        f"from the time of a few steps; {total:,.0f} in all. How long a GPU takes for "
        "them has not been measured. Sizes are those of the published data sets.",
    )
