"""``know eval --trajectory branches``: what fusing continuations of one network is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from know_cli.errors import UsageError
from know_cli.evaluation.precision import Precision

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output

RESULTS = "branches.json"


def evaluate_branches(
    talk: Output,
    *,
    folder: Path,
    tasks: list[str],
    seeds: range | None,
    suite: str,
    length: float,
    data_folder: Path | None,
    processes: int,
    device: str,
    precision: Precision,
    shard: tuple[int, int],
    dry_run: bool,
    table: Path | None,
    force: bool,
) -> None:
    """Run the trials, write ``branches.json`` and the page, and show a table of each task.

    Args:
        talk: to the user.
        folder: for the results, and in ``work`` what each trial found.
        tasks: names or patterns; none for all.
        seeds: to run; None for the suite's.
        suite: its name.
        length: of the runs, as a multiple of each task's own.
        data_folder: where the data sets' files are.
        processes: trials at the same time.
        device: where networks are trained; with ``cuda:all`` trials take them in turn.
        precision: in which networks compute.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
        dry_run: show what there is to run, and compute nothing.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        KnowError: a task or data set is missing, or a file cannot be written.
    """
    from know_cli.cli.eval_plan import show_plan
    from know_cli.cli.eval_results import gather, publish, shard_is_done, tell_of_other_torch
    from know_cli.cli.report_file import is_own_result
    from know_cli.engine.devices import choose_devices
    from know_cli.evaluation.branches import suite as running
    from know_cli.evaluation.branches.markdown import to_markdown
    from know_cli.evaluation.branches.plan import find_branch_tasks
    from know_cli.evaluation.costs import costs
    from know_cli.evaluation.jobs import jobs
    from know_cli.evaluation.suite import SUITES

    replaces = is_own_result(folder / RESULTS)
    tell_of_other_torch(talk, folder / RESULTS)
    asked = find_branch_tasks(tasks)
    not_run = running.not_here(asked, data_folder)
    for name, reason in not_run.items():
        talk.notice(f"{name}: not run here, {reason}")
    wanted = seeds or range(SUITES[suite])
    request = running.BranchRequest(
        folder=folder,
        tasks=[task for task in asked if task.name not in not_run],
        seeds=len(wanted),
        first_seed=wanted.start,
        length=length,
        data_folder=data_folder,
        processes=processes,
        devices=choose_devices(device),
        precision=precision,
        shard=shard,
    )
    if not request.tasks:
        raise UsageError("none of these tasks can run here; see the notices above")
    if dry_run:
        show_plan(talk, request, costs("branches"))
        return
    total = len(jobs(request))
    outcomes = gather(talk, running.evaluate(request), total)
    if shard_is_done(talk, shard):
        return
    content = running.to_json(request, outcomes, not_run)
    publish(
        talk, content, folder / RESULTS, to_markdown, _task_table, table,
        replaces=replaces, force=force,
    )  # fmt: skip


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
