"""``know eval --trajectory run``: what averages of an ordinary run's checkpoints are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.eval_options import is_given
from know_cli.errors import UsageError
from know_cli.evaluation.precision import Precision

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output
    from know_cli.evaluation.runs.measures import RunMeasure

RESULTS = "runs.json"
# Options that only forgettings have, by parameter; bundles can be measured on runs, too.
_OF_FORGETTINGS = {
    "method": "--method",
    "bundle": "--bundle",
    "steps": "--steps",
    "norm": "--norm",
    "sessions": "--sessions",
    "keep": "--keep/--no-keep",
    "budget": "--budget",
    "regime": "--regime",
    "share": "--share",
    "first": "--from",
}


def check(context: typer.Context, trajectory: TrajectoryKind) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: the reason.
    """
    is_run = trajectory is TrajectoryKind.RUN
    for name, option in _OF_FORGETTINGS.items():
        if name == "bundle" and is_run:
            continue
        if is_given(context, name):
            others = " and run" if name == "bundle" else ""
            raise UsageError(
                f"{option} is for --trajectory forgetting{others}, not for {trajectory.value}"
            )


def evaluate_runs(
    talk: Output,
    *,
    folder: Path,
    tasks: list[str],
    seeds: range | None,
    suite: str,
    measures: Sequence[RunMeasure],
    length: float,
    bundles: Mapping[str, str],
    data_folder: Path | None,
    processes: int,
    device: str,
    precision: Precision,
    shard: tuple[int, int],
    dry_run: bool,
    table: Path | None,
    force: bool,
) -> None:
    """Run the trials, write ``runs.json`` and the page, and show a table of each measure.

    Args:
        talk: to the user.
        folder: for the results, and in ``work`` everything that is trained.
        tasks: names or patterns; none for all but the large ones.
        seeds: to run; None for the suite's.
        suite: its name.
        measures: what to measure.
        length: of the runs, as a multiple of each task's own.
        bundles: paths of bundles that are measured beside the averages, by name; by the
            pre-training's own measure only.
        data_folder: where the data sets' files are.
        processes: trials at the same time.
        device: where networks are trained; with ``cuda:all`` trials take them in turn.
        precision: in which networks compute.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
        dry_run: show what there is to run, and compute nothing.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        KnowError: a task, a data set or a bundle is missing, a bundle would not be measured, or a
            file cannot be written.
    """
    from know_cli.cli.eval_plan import show_plan
    from know_cli.cli.eval_results import gather, publish, shard_is_done, tell_of_other_torch
    from know_cli.cli.report_file import is_own_result
    from know_cli.engine.devices import choose_devices
    from know_cli.evaluation import suite as running
    from know_cli.evaluation.costs import costs
    from know_cli.evaluation.jobs import jobs
    from know_cli.evaluation.runs import results as of_results
    from know_cli.evaluation.runs.bundles import check_bundles
    from know_cli.evaluation.runs.markdown import to_markdown
    from know_cli.evaluation.runs.measures import RunMeasure
    from know_cli.evaluation.runs.suite import evaluate
    from know_cli.evaluation.starts import Wanted
    from know_cli.evaluation.tasks import find_tasks

    replaces = is_own_result(folder / RESULTS)
    tell_of_other_torch(talk, folder / RESULTS)
    if bundles and RunMeasure.PRETRAINING not in measures:
        raise UsageError(
            "--bundle: is measured with the pre-training's own measure; give --measure "
            f"{RunMeasure.PRETRAINING.value} as well"
        )
    check_bundles(bundles)
    wanted = seeds or range(running.SUITES[suite])
    request = running.Request(
        folder=folder,
        tasks=find_tasks(tasks),
        seeds=len(wanted),
        first_seed=wanted.start,
        wanted=Wanted(()),
        data_folder=data_folder,
        processes=processes,
        devices=choose_devices(device),
        precision=precision,
        shard=shard,
    )
    not_run = running.not_here(request)
    request = running.without(request, not_run)
    for name, reason in not_run.items():
        talk.notice(f"{name}: not run here, {reason}")
    if not request.tasks:
        raise UsageError("none of these tasks can run here; see the notices above")
    if dry_run:
        show_plan(talk, request, costs("run"), "without --measure falling")
        return
    total = len(jobs(request))
    outcomes = gather(talk, evaluate(request, measures, length, bundles), total)
    if shard_is_done(talk, shard):
        return
    content = of_results.to_json(request, outcomes, not_run, length)
    if not content["tasks"]:
        raise UsageError(f"{folder}: has no run yet; measure pretraining first")
    publish(
        talk, content, folder / RESULTS, to_markdown, _task_table, table,
        replaces=replaces, force=force,
    )  # fmt: skip


def _task_table(task: Mapping[str, Any]) -> Table:
    """Every arm of a task: its mean, the paired difference from ``last``, the recovered gain."""
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.runs.plan import LAST
    from know_cli.evaluation.runs.results import compare, pretraining_values

    found, measure = compare(pretraining_values(task)), task["facts"]["measure"]
    scale = measure["scale"]
    digits = 2 if scale > 1 else 3
    table = new_table(
        "of the run", f"{measure['name']}, {measure['unit']}", "− last (95 %)", "recovered gain"
    )
    for name, mean in found.means.items():
        difference, gain = "-", "-"
        if name != LAST:
            estimate = found.differences[name]
            half = scale * estimate.half_width
            difference = f"{scale * estimate.value:+.{digits}f} ± {half:.{digits}f}"
        if name in found.gains:
            estimate = found.gains[name]
            gain = f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
        table.add_row(name, f"{scale * mean:.{digits}f}", difference, gain)
    return table
