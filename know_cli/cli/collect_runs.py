"""``know collect --regime run``: record ordinary runs of small networks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from know_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.meta.run_collecting import CollectedRun, RunRequest

# Columns of the table: names in ``measured``.
_SHOWN = (
    "last", "average", "annealed-10", "annealed-20", "annealed-40", "longer", "future-mean",
)  # fmt: skip
# Of these, what the line of a run shows.
_IN_LINE = ("last", "average", "annealed-10", "annealed-20")


def collect_runs(talk: Output, request: RunRequest) -> None:
    """Collect the missing runs, report each on standard error, and show a table of all.

    Raises:
        KnowError: a data set or an architecture cannot be used, or a file cannot be written.
    """
    from know_cli.meta.run_collecting import collect_runs as collect_all
    from know_cli.meta.run_collecting import existing_runs

    done = existing_runs(request)
    wanted = len(request.numbers())
    talk.notice(f"data sets: {', '.join(request.data_sets)}")
    if done:
        talk.notice(f"{request.folder}: {len(done)} runs are already there, continuing")
    began = time.perf_counter()
    for one in collect_all(request):
        done.append(one)
        talk.notice(f"{_line(one)}; {one.seconds or 0:.0f} s; {len(done)} of {wanted}")
    left_out = sum(bool(one.reason) for one in done)
    talk.show(
        _table(done),
        "",
        f"{request.folder}: {len(done)} of {wanted} runs, {left_out} of them left out; "
        f"{time.perf_counter() - began:.0f} s",
    )


def _line(one: CollectedRun) -> str:
    if one.reason:
        return f"{one.number:05d} left out: {one.reason}"
    setup, measured = one.facts["setup"], one.facts["measured"]
    accuracies = ", ".join(
        f"{name} {measured[name]['test_accuracy']:.3f}" for name in _IN_LINE if name in measured
    )
    return (
        f"{one.number:05d} {setup['design']['architecture']} on {setup['data_set']}, "
        f"{setup['checkpoints']} checkpoints {setup['spacing']} steps apart up to {setup['end']}, "
        f"test accuracy {accuracies}"
    )


def _table(done: Iterable[CollectedRun]) -> Table:
    """One row per architecture: mean test accuracies."""
    from know_cli.cli.tables import new_table

    rows: dict[str, list[CollectedRun]] = {}
    for one in done:
        if not one.reason:
            rows.setdefault(one.facts["setup"]["design"]["architecture"], []).append(one)
    measured = [run.facts["measured"] for runs in rows.values() for run in runs]
    shown = [column for column in _SHOWN if all(column in found for found in measured)]
    table = new_table("architecture", "runs", *shown)
    for name, runs in sorted(rows.items()):
        means = (
            sum(run.facts["measured"][column]["test_accuracy"] for run in runs) / len(runs)
            for column in shown
        )
        table.add_row(name, str(len(runs)), *(f"{mean:.3f}" for mean in means))
    return table
