"""``know eval --dry-run``: which trials there are, and what they cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from know_cli.errors import counted
from know_cli.evaluation.costs import Costs
from know_cli.evaluation.jobs import Trials, jobs

if TYPE_CHECKING:
    from know_cli.cli.output import Output

_HOUR = 3600


def show_plan(
    talk: Output, request: Trials, measured: Costs, what: str = "with all starts"
) -> None:
    """Show the trials of each task, and their hours as they were measured elsewhere.

    Args:
        talk: to the user.
        request: what would be run.
        measured: what a trial of each task costs.
        what: what of it that is, in words.
    """
    from know_cli.cli.tables import new_table

    trials = Counter(task.name for task, _ in jobs(request))
    table = new_table("task", "trials", "hours")
    total = 0.0
    for name, count in trials.items():
        seconds = measured.seconds.get(name)
        hours = "not known" if seconds is None else f"{count * seconds / _HOUR:.2f}"
        total += count * (seconds or 0)
        table.add_row(name, str(count), hours)
    talk.show("", "nothing is computed; without --dry-run these trials are run:", table)
    unknown = [name for name in trials if name not in measured.seconds]
    least = "at least " if unknown else ""
    talk.show(
        f"{counted(sum(trials.values()), 'trial')}, {least}{total / _HOUR:.2f} hours of processor "
        f"time (measured on {measured.processor}, {what}), {request.processes} at a time; "
        "what is there already costs nothing"
    )
