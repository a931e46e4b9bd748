"""``know eval --trajectory branches``: what fusing continuations of one network is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from know_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output

RESULTS = "branches.json"


def evaluate_branches(
    talk: Output,
    *,
    folder: Path,
    tasks: list[str],
    seeds: int | None,
    suite: str,
    length: float,
    data_folder: Path | None,
    processes: int,
    table: Path | None,
    force: bool,
) -> None:
    """Run the trials, write ``branches.json`` and the page, and show a table of each task.

    Args:
        talk: to the user.
        folder: for the results, and in ``work`` what each trial found.
        tasks: names or patterns; none for all.
        seeds: their number; None for the suite's.
        suite: its name.
        length: of the runs, as a multiple of each task's own.
        data_folder: where the data sets' files are.
        processes: trials at the same time.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        KnowError: a task or data set is missing, or a file cannot be written.
    """
    from know_cli.cli.report_file import is_own_result, write_out
    from know_cli.evaluation.branches import suite as running
    from know_cli.evaluation.branches.markdown import to_markdown
    from know_cli.evaluation.branches.plan import find_branch_tasks
    from know_cli.evaluation.suite import SUITES
    from know_cli.files import json_text, printable_texts, write_text

    replaces = is_own_result(folder / RESULTS)
    asked = find_branch_tasks(tasks)
    not_run = running.not_here(asked, data_folder)
    for name, reason in not_run.items():
        talk.notice(f"{name}: not run here, {reason}")
    request = running.BranchRequest(
        folder=folder,
        tasks=[task for task in asked if task.name not in not_run],
        seeds=seeds or SUITES[suite],
        length=length,
        data_folder=data_folder,
        processes=processes,
    )
    if not request.tasks:
        raise UsageError("none of these tasks can run here; see the notices above")
    outcomes = []
    for outcome in running.evaluate(request):
        outcomes.append(outcome)
        talk.notice(
            f"{outcome.task}, seed {outcome.seed}: {len(outcomes)} of "
            f"{len(request.tasks) * request.seeds}"
        )
    content = running.to_json(request, outcomes, not_run)
    write_text(folder / RESULTS, json_text(content, indent=1), replace=replaces)
    if table is not None:
        write_out(table, to_markdown(printable_texts(content)), force=force)
    for name, of_task in content["tasks"].items():
        talk.show("", f"{name}: {of_task['title']}", _task_table(of_task))
    talk.show("", f"wrote {folder / RESULTS}")
    if table is not None:
        talk.show(f"wrote {'the tables' if talk.aside else table}")


def _task_table(task: Mapping[str, Any]) -> Table:
    """Every arm of a task: its mean and its paired difference from Θ0."""
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.branches.markdown import gain
    from know_cli.evaluation.branches.plan import NAIVE
    from know_cli.evaluation.runs.wording import difference_text, digits

    measure = task["facts"]["measure"]
    scale = measure["scale"]
    table = new_table("of the branches", f"{measure['name']}, {measure['unit']}", "− Θ0 (95 %)")
    for arm, found in task["values"].items():
        mean = f"{scale * sum(found) / len(found):.{digits(scale)}f}"
        difference = "-" if arm == NAIVE else difference_text(gain(task, arm, NAIVE), scale)
        table.add_row("Θ0" if arm == NAIVE else arm, mean, difference)
    return table
