"""``know collect --regime run`` and ``branches``: record ordinary runs of small networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.output import Output
from know_cli.errors import counted

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.meta.run_collecting import CollectedRun, CollectingRequest


@dataclass(frozen=True)
class _Shown:
    """What is shown of one kind of trajectory.

    Attributes:
        columns: of the table: names in ``measured``.
        in_line: of these, what the line of a run shows.
        describe: a setup in a few words.
    """

    columns: tuple[str, ...]
    in_line: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], str]


def _describe_run(setup: Mapping[str, Any]) -> str:
    apart = counted(setup["spacing"], "step")
    return f"{setup['checkpoints']} checkpoints {apart} apart up to {setup['end']}"


def _describe_branches(setup: Mapping[str, Any]) -> str:
    part = f" on {setup['fraction']:g} of the samples" if setup["fraction"] < 1 else ""
    return (
        f"{setup['checkpoints'] - 1} branches of {counted(setup['steps'], 'step')} after "
        f"{setup['end']}{part}"
    )


_OF_BRANCHES = ("naive", "branch", "average", "longer", "annealed")
_SHOWN = {
    TrajectoryKind.RUN: _Shown(
        ("last", "average", "annealed-10", "annealed-20", "annealed-40", "longer", "future-mean"),
        ("last", "average", "annealed-10", "annealed-20"),
        _describe_run,
    ),
    TrajectoryKind.BRANCHES: _Shown(_OF_BRANCHES, _OF_BRANCHES, _describe_branches),
}


def collect_runs(talk: Output, request: CollectingRequest[Any]) -> None:
    """Collect the missing runs or branches, report each on standard error, and show a table of all.

    Raises:
        KnowError: a data set or an architecture cannot be used, or a file cannot be written.
    """
    from know_cli.meta.run_collecting import collect_runs as collect_all
    from know_cli.meta.run_collecting import existing_runs

    done, what, shown = existing_runs(request), request.trajectory.units, _SHOWN[request.trajectory]
    wanted = len(request.numbers())
    talk.notice(f"data sets: {', '.join(request.data_sets)}")
    if done:
        there = f"{request.trajectory.counted(len(done))} {'is' if len(done) == 1 else 'are'}"
        talk.notice(f"{request.folder}: {there} already there, continuing")
    began = time.perf_counter()
    for one in collect_all(request):
        done.append(one)
        talk.notice(f"{_line(one, shown)}; {one.seconds or 0:.0f} s; {len(done)} of {wanted}")
    left_out = sum(bool(one.reason) for one in done)
    talk.show(
        _table(done, what, shown.columns),
        "",
        f"{request.folder}: {len(done)} of {request.trajectory.counted(wanted)}, {left_out} of "
        f"them left out; {time.perf_counter() - began:.0f} s",
    )


def _line(one: CollectedRun, shown: _Shown) -> str:
    if one.reason:
        return f"{one.number:05d} left out: {one.reason}"
    setup, measured = one.facts["setup"], one.facts["measured"]
    accuracies = ", ".join(
        f"{name} {measured[name]['test_accuracy']:.3f}"
        for name in shown.in_line
        if name in measured
    )
    return (
        f"{one.number:05d} {setup['design']['architecture']} on {setup['data_set']}, "
        f"{shown.describe(setup)}, test accuracy {accuracies}"
    )


def _table(done: Iterable[CollectedRun], what: str, columns: Iterable[str]) -> Table:
    """One row per architecture: mean test accuracies."""
    from know_cli.cli.tables import new_table

    rows: dict[str, list[CollectedRun]] = {}
    for one in done:
        if not one.reason:
            rows.setdefault(one.facts["setup"]["design"]["architecture"], []).append(one)
    measured = [run.facts["measured"] for runs in rows.values() for run in runs]
    shown = [column for column in columns if all(column in found for found in measured)]
    table = new_table("architecture", what, *shown)
    for name, runs in sorted(rows.items()):
        means = (
            sum(run.facts["measured"][column]["test_accuracy"] for run in runs) / len(runs)
            for column in shown
        )
        table.add_row(name, str(len(runs)), *(f"{mean:.3f}" for mean in means))
    return table
