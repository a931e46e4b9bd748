"""How far an evaluation in the converged regime has come, told while it runs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from know_cli.cli.eval_results import time_left
from know_cli.evaluation.jobs import jobs

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output
    from know_cli.evaluation.starts import Outcome
    from know_cli.evaluation.suite import Request


@contextmanager
def display(talk: Output, request: Request) -> Iterator[Callable[[Outcome], None]]:
    """A live table on a terminal, one line per trial elsewhere."""
    done: dict[str, list[Outcome]] = {task.name: [] for task in request.tasks}

    def count(outcome: Outcome) -> None:
        done[outcome.task].append(outcome)

    began = time.perf_counter()
    if talk.quiet or not sys.stderr.isatty():

        def report(outcome: Outcome) -> None:
            count(outcome)
            finished, total = sum(map(len, done.values())), len(jobs(request))
            left = time_left(time.perf_counter() - began, finished, total)
            talk.notice(f"{_line(outcome)}; {finished} of {total}{left}")

        yield report
        return
    from rich.live import Live

    with Live(_progress(done, request), console=talk.console(stderr=True), transient=True) as live:

        def show(outcome: Outcome) -> None:
            count(outcome)
            live.update(_progress(done, request))

        yield show


def _line(outcome: Outcome) -> str:
    work = f"{outcome.computed} results computed" if outcome.computed else "all there already"
    return f"{outcome.task}, seed {outcome.seed}: {work}, {outcome.seconds:.0f} s of processor time"


def _progress(done: Mapping[str, list[Outcome]], request: Request) -> Table:
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.anchors import NAIVE, ORACLE, SCRATCH

    seeds = Counter(task.name for task, _ in jobs(request))
    table = new_table("task", "seeds", SCRATCH, NAIVE, ORACLE, "seconds per seed")
    for name, outcomes in done.items():
        cells = ["-"] * 4
        if outcomes:
            cells = [f"{_mean(outcomes, start):.3f}" for start in (SCRATCH, NAIVE, ORACLE)]
            cells.append(f"{sum(o.seconds for o in outcomes) / len(outcomes):.0f}")
        table.add_row(name, f"{len(outcomes)} of {seeds[name]}", *cells)
    return table


def _mean(outcomes: list[Outcome], method: str) -> float:
    """An anchor's mean so far, over seeds and cells."""
    values = [
        value
        for outcome in outcomes
        for start, cells in outcome.values.items()
        if start.method == method
        for value in cells.values()
    ]
    return sum(values) / len(values)
