"""``know eval --regime release``: what predicted weights are worth where the paper shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from know_cli.cli.eval_options import is_given
from know_cli.errors import UsageError
from know_cli.evaluation.precision import Precision

if TYPE_CHECKING:
    from rich.table import Table

    from know_cli.cli.output import Output
    from know_cli.evaluation.release.suite import ReleaseOutcome

RESULTS = "release.json"
# Options that only the converged regime has, by parameter.
_OF_CONVERGED = {
    "steps": "--steps",
    "norm": "--norm",
    "sessions": "--sessions",
    "keep": "--keep/--no-keep",
    "budget": "--budget",
    "measure": "--measure",
    "length": "--length",
}


def check_release(context: typer.Context) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: the reason.
    """
    for name, option in _OF_CONVERGED.items():
        if is_given(context, name):
            raise UsageError(f"{option}: has no effect with --regime release; leave it out")


def evaluate_release(
    talk: Output,
    *,
    folder: Path,
    tasks: list[str],
    methods: list[str],
    bundles: Mapping[str, str],
    shares: Sequence[int],
    seeds: range | None,
    suite: str,
    data_folder: Path | None,
    processes: int,
    shard: tuple[int, int],
    dry_run: bool,
    device: str,
    precision: Precision,
    first: Path | None,
    table: Path | None,
    force: bool,
) -> None:
    """Run the trials, write ``release.json`` and the page, and show a table of each task.

    The JSON is written after each trial, so that an interrupted run leaves what it has.

    Args:
        talk: to the user.
        folder: for the results, and in ``work`` everything that is trained.
        tasks: names or patterns; none for all.
        methods: labels of starts or patterns; none for all, BatchNorm treated as usual.
        bundles: paths of further bundles, by name.
        shares: of the downstream examples, in per cent; none for all.
        seeds: to run; None for the suite's.
        suite: its name.
        data_folder: where the data sets' files are.
        processes: trials at the same time.
        shard: (i, n): the trials i, i + n, i + 2n, … are run.
        device: where networks are trained; with ``cuda:all`` trials take them in turn.
        precision: in which networks compute.
        first: checkpoint of a Θ0 that is trained already; None trains it.
        dry_run: show what there is to run, and compute nothing.
        table: for the page; None for no page.
        force: whether a page that exists is replaced.

    Raises:
        KnowError: a task, a start, a bundle or a data set is missing, or a file cannot be written.
    """
    from know_cli.checkpoints import open_checkpoint
    from know_cli.cli.eval_plan import show_plan
    from know_cli.cli.eval_results import gather, publish, shard_is_done, tell_of_other_torch
    from know_cli.cli.report_file import is_own_result
    from know_cli.engine.devices import choose_devices
    from know_cli.evaluation.jobs import jobs
    from know_cli.evaluation.release import suite as running
    from know_cli.evaluation.release.cost import USUAL_RATES, request_costs
    from know_cli.evaluation.release.markdown import to_markdown
    from know_cli.evaluation.release.plan import check_methods, find_release_tasks
    from know_cli.evaluation.release.regime import SHARES
    from know_cli.evaluation.release.results import read_release, to_json
    from know_cli.evaluation.suite import SUITES
    from know_cli.files import json_text, write_text

    path = folder / RESULTS
    replaces = is_own_result(path)
    tell_of_other_torch(talk, path)
    if replaces and not dry_run and read_release(path).get("joined"):
        raise UsageError(
            f"{path}: was joined with other machines' results, which a run would leave out; name "
            "another folder, and join its results to this one"
        )
    unknown = [share for share in shares if share not in SHARES]
    if unknown:
        raise UsageError(
            f"--share {unknown[0]}: choose from {', '.join(str(share) for share in SHARES)}"
        )
    if first is not None:  # before pictures are read, which takes minutes
        with open_checkpoint(first):
            pass
    asked = find_release_tasks(tasks)
    check_methods(asked, bundles, methods)
    not_run = running.not_here(asked, data_folder)
    for name, reason in not_run.items():
        talk.notice(f"{name}: not run here, {reason}")
    wanted = seeds or range(SUITES[suite])
    request = running.ReleaseRequest(
        folder=folder,
        tasks=[task for task in asked if task.name not in not_run],
        seeds=len(wanted),
        first_seed=wanted.start,
        shares=tuple(shares or SHARES),
        methods=tuple(methods),
        bundles=bundles,
        data_folder=data_folder,
        processes=processes,
        shard=shard,
        devices=choose_devices(device),
        precision=precision,
        first=first,
    )
    if not request.tasks:
        raise UsageError("none of these tasks can run here; see the notices above")
    if dry_run:
        show_plan(talk, request, request_costs(request), f"at {USUAL_RATES} rates a start")
        return

    def kept() -> Iterator[ReleaseOutcome]:
        nonlocal replaces
        outcomes: list[ReleaseOutcome] = []
        for outcome in running.evaluate(request):
            outcomes.append(outcome)
            if shard[1] > 1:  # other shards would write the same file
                yield outcome
                continue
            content = to_json(request, outcomes, not_run)
            write_text(path, json_text(content, indent=1), replace=replaces)
            replaces = True
            yield outcome

    total = len(jobs(request))
    found = gather(talk, kept(), total)
    if shard_is_done(talk, shard):
        return
    content = to_json(request, found, not_run)
    publish(
        talk, content, path, to_markdown, task_table, table, replaces=replaces, force=force
    )  # fmt: skip


def task_table(task: Mapping[str, Any]) -> Table:
    """Every start of each condition: accuracy and difference from Θ0, at both rates."""
    from know_cli.cli.tables import new_table
    from know_cli.evaluation.release.results import at_own_rate, at_tuned_rate
    from know_cli.evaluation.runs.wording import difference_text, digits

    measure = task["facts"]["measure"]
    scale = measure["scale"]
    table = new_table("examples", "start", "release's rate", "− naive", "tuned rate", "− naive")
    for condition, cell in task["cells"].items():
        own, best = at_own_rate(cell), at_tuned_rate(cell)
        for name in own:
            row = []
            for standing in (own[name], best[name]):
                difference = standing.difference
                row.append(f"{scale * standing.mean:.{digits(scale)}f}")
                row.append("-" if difference is None else difference_text(difference, scale))
            table.add_row(condition, name, *row)
    return table
