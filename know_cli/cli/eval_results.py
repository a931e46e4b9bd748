"""What ``know eval`` of runs and of branches have in common: how results are told and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output


class _Trial(Protocol):
    """The outcome of a trial."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def seed(self) -> int:
        """Of the trial."""


Found = TypeVar("Found", bound=_Trial)


def gather(talk: Output, outcomes: Iterable[Found], total: int) -> list[Found]:
    """All outcomes, each of which is told when it is there.

    Args:
        talk: to the user.
        outcomes: of trials, as they end.
        total: their number.
    """
    found: list[Found] = []
    began = time.perf_counter()
    for outcome in outcomes:
        found.append(outcome)
        left = time_left(time.perf_counter() - began, len(found), total)
        talk.notice(f"{outcome.task}, seed {outcome.seed}: {len(found)} of {total}{left}")
    return found


def time_left(passed: float, done: int, total: int) -> str:
    """How long the rest takes if it goes on as it did, in words; empty at the end.

    >>> time_left(3600, 4, 6)
    ', about 30 min left'
    >>> time_left(7, 6, 6)
    ''
    """
    if done >= total:
        return ""
    minutes = passed / done * (total - done) / 60
    return (
        f", about {minutes:.0f} min left" if minutes < 120 else f", about {minutes / 60:.0f} h left"
    )


def shard_is_done(talk: Output, shard: tuple[int, int]) -> bool:
    """Whether only a part of the trials was run, which is told."""
    index, count = shard
    if count > 1:
        talk.show(
            f"shard {index + 1} of {count} is done; when all are, the same command without "
            "--shard collects their results"
        )
    return count > 1


def tell_of_other_torch(talk: Output, path: Path) -> None:
    """Say that results are there of another version of torch, which rounds differently.

    What the folder keeps is found by what it depends on, to which the version does not belong:
    results that cost weeks outlive an upgrade, and whoever mixes them should know.

    Args:
        talk: to the user.
        path: of results that an earlier run wrote.
    """
    import json

    from know_cli.files import read_text
    from know_cli.lab.machine import machine

    try:
        there, here = json.loads(read_text(path))["machine"]["torch"], machine()["torch"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if there != here:
        talk.notice(
            f"{path}: is from torch {there}, and this is torch {here}, which may round "
            "differently; what is there is not computed again, so that results would be mixed; "
            "another folder has all of one version"
        )


def publish(
    talk: Output,
    content: Mapping[str, Any],
    path: Path,
    page: Callable[[Mapping[str, Any]], str],
    task_table: Callable[[Mapping[str, Any]], Table],
    table: Path | None,
    *,
    replaces: bool,
    force: bool,
) -> None:
    """Write the results and their page, and show a table of each task.

    Args:
        talk: to the user.
        content: the results, with ``tasks``.
        path: of their JSON.
        page: makes their Markdown.
        task_table: makes the table of a task.
        table: where the Markdown goes; None for nowhere.
        replaces: whether the JSON is there already, and replaced.
        force: whether a page that exists is replaced.

    Raises:
        OutputError: a file cannot be written.
    """
    from know_cli.cli.report_file import write_out
    from know_cli.files import json_text, printable_texts, write_text

    write_text(path, json_text(content, indent=1), replace=replaces)
    if table is not None:
        write_out(table, page(printable_texts(content)), force=force)
    for name, of_task in content["tasks"].items():
        talk.show("", f"{name}: {of_task['title']}", task_table(of_task))
    talk.show("", f"wrote {path}")
    if table is not None:
        talk.show(f"wrote {'the tables' if talk.aside else table}")


def forgetting_table(task: Mapping[str, Any]) -> Table:
    """Every start of a task: mean over its cells, paired difference and recovered gain."""
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.anchors import NAIVE
    from know_cli.evaluation.results import ALL, comparisons

    found, scale = comparisons(task)[ALL], task["measure"]["scale"]
    unit = f"{task['measure']['name']}, {task['measure']['unit']}"
    table = new_table(f"start ({found.status.value})", unit, "− naive (95 %)", "recovered gain")
    for name, mean in found.means.items():
        difference, gain = "-", "-"
        if name != NAIVE:
            estimate = found.differences[name]
            difference = f"{scale * estimate.value:+.2f} ± {scale * estimate.half_width:.2f}"
        if name in found.gains:
            estimate = found.gains[name]
            gain = f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
        table.add_row(name, f"{scale * mean:.2f}", difference, gain)
    return table
