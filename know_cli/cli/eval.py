"""``know eval``: what predicted weights are worth downstream."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.eval_options import (
    from_option,
    join_option,
    parse_seeds,
    seeds_option,
    shard_option,
)
from know_cli.cli.options import (
    data_folder_option,
    force_option,
    parse_named,
    parse_shard,
    quiet_option,
    usual_processes,
)
from know_cli.cli.output import Output
from know_cli.engine.settings import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.precision import Precision
from know_cli.evaluation.release.regime import Regime
from know_cli.evaluation.runs.measures import RunMeasure
from know_cli.files import missing_folder

if TYPE_CHECKING:
    from know_cli.evaluation.starts import Outcome

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know eval --suite small -o evaluation",
        "know eval --task 'fashion-*' --seeds 10 --method continuation --bundle mine=./my-known "
        "-o evaluation",
        "know eval --task fashion-classes-resnet --norm rescale --norm copy --norm reset "
        "-o evaluation",
        "know eval --trajectory run --suite full -o runs --table runs.md",
        "know eval --regime release --task release-cifar10-resnet --share 25 --data-folder DATA "
        "-o release --table release.md",
        "know eval --paper -o release",
    )
)
RESULTS = "results.json"
_FEWEST_SESSIONS, _MOST_SESSIONS = 2, 5


class Suite(str, Enum):
    """Values of ``--suite``."""

    SMALL = "small"
    FULL = "full"


def evaluate(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FOLDER",
            show_default=False,
            help="For results.json (runs.json, branches.json, release.json), and in 'work' "
            "everything that is trained, for the next run. With --paper, where release.json is, or "
            "folders that have one.",
        ),
    ] = None,
    trajectory: Annotated[
        TrajectoryKind,
        typer.Option(
            help="What the checkpoints come from: a recorded forgetting; one ordinary run, whose "
            "averages are measured; or branches of one, which are fused.",
        ),
    ] = TrajectoryKind.FORGETTING,
    regime: Annotated[
        Regime,
        typer.Option(
            help="Of forgettings: converged networks, fine-tuned on few images; or the protocol "
            "of the method's authors' release, at its rate and at a rate tuned for each start.",
        ),
    ] = Regime.CONVERGED,
    share: Annotated[
        list[int] | None,
        typer.Option(
            metavar="PERCENT",
            show_default="all",
            help="Of the release regime: share of the downstream examples, 25, 50 or 100; "
            "repeatable.",
        ),
    ] = None,
    measure: Annotated[
        list[RunMeasure] | None,
        typer.Option(
            show_default="all",
            help="Of runs: what to measure in this call; what was measured before is shown as "
            "well. Repeatable.",
        ),
    ] = None,
    length: Annotated[
        float,
        typer.Option(
            metavar="FACTOR",
            min=0.01,
            max=100,
            help="Of runs, and those that are branched: how long they are, as a multiple of "
            "each task's own.",
        ),
    ] = 1.0,
    suite: Annotated[
        Suite, typer.Option(help="small: every task with 3 seeds; full: with 10.")
    ] = Suite.SMALL,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="all but the large ones",
            help="A task or a pattern such as 'fashion-*'; repeatable.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            show_default="all",
            help="A method, or in the release regime a start or a pattern, such as '*-stored' for "
            "all with BatchNorm as it was; repeatable.",
        ),
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            show_default=False,
            help="Also evaluate this bundle under this name; repeatable.",
        ),
    ] = None,
    seeds: Annotated[str | None, seeds_option()] = None,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, max=8, help="The most steps to predict.")
    ] = 3,
    norm: Annotated[
        list[NormMode] | None,
        typer.Option(show_default="rescale", help="Treatment of normalisation layers; repeatable."),
    ] = None,
    sessions: Annotated[
        list[int] | None,
        typer.Option(
            metavar="S",
            min=_FEWEST_SESSIONS,
            max=_MOST_SESSIONS,
            show_default="5",
            help="Predict from the first S checkpoints; repeatable.",
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Fine-tunings of the search for the row 'chosen', for each downstream condition; "
            "0 leaves it out.",
        ),
    ] = 40,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", show_default=False, help="Write all tables as Markdown."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            show_default="one per core, or per card",
            help="Trials to run at the same time, with one thread each.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda[:i]|cuda:all|mps|xpu",
            help="Where networks are trained; with cuda:all trials take the cards in turn. "
            "Several --processes share a card.",
        ),
    ] = "cpu",
    precision: Annotated[
        Precision,
        typer.Option(
            help="In which networks compute; with bfloat16 weights and sums stay float32. What was "
            "trained in one is not mixed with the other."
        ),
    ] = Precision.FLOAT32,
    first: Annotated[Path | None, from_option()] = None,
    shard: Annotated[str, shard_option()] = "1/1",
    join: Annotated[list[Path] | None, join_option()] = None,
    data_folder: Annotated[Path | None, data_folder_option()] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep",
            help="Keep checkpoints, so that methods can be added later without training again.",
        ),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show which trials there are and what they cost, and compute nothing."
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Instead, show the paper's tables, with what --regime release wrote into FOLDER "
            "beside its figures; with --dry-run, what its experiments take.",
        ),
    ] = False,
    force: Annotated[bool, force_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Measure what predicted weights are worth downstream, against every control.

    Each task pre-trains a network on images or text that KNOWN has never seen, lets it forget,
    predicts with every method, and fine-tunes from every prediction, and likewise from Θ0 itself,
    fresh weights, Θ0 trained longer, and Θ0 trained on twice the data. Results that are already in
    FOLDER are not computed again: an interrupted run continues where it stopped, and adding seeds,
    tasks or methods costs only what they need.

    With --trajectory run, each task's network is trained at a constant rate instead, and averages
    of its last checkpoints are compared with the last one, and with the run annealed, trained
    longer, and on a schedule that falls: by the pre-training's own test, and fine-tuned at a rate
    that is tuned for each.

    With --trajectory branches, several continuations of one run (the same data in other orders,
    independent subsets, other tasks) are fused, and compared with Θ0, with each of them, and with
    one continuation of as many steps.

    With --regime release, everything is trained as the method's authors' release trains, for one
    epoch at a constant rate, and every start is fine-tuned at the release's rate and at one that is
    tuned for it, beside Θ0 trained longer, trained on more data, and shrunk.
    """
    from know_cli.cli import eval_branches, eval_release, eval_runs
    from know_cli.cli.report_file import (
        check_report_path,
        is_own_result,
        takes_stdout,
        write_out,
    )

    talk = Output(quiet, aside=takes_stdout(table))
    part = parse_shard(shard)
    wanted_seeds = None if seeds is None else parse_seeds(seeds)
    if part[1] > 1 and table is not None:
        raise UsageError("--table: a shard has only some of the results; leave it out, or --shard")
    bundles = parse_named(bundle or [], "--bundle", "PATH")
    if table is not None:
        names = (RESULTS, *(one.RESULTS for one in (eval_branches, eval_release, eval_runs)))
        results = [] if output is None else [output / name for name in names]
        check_report_path(table, results, "--table", force=force)
    if paper:
        from know_cli.cli.eval_paper import check_paper, show_paper

        check_paper(context)
        show_paper(
            talk, folder=output, data_folder=data_folder, dry_run=dry_run, table=table, force=force
        )
        return
    if output is None:
        raise UsageError("-o/--output is missing: name a folder for the results")
    if not output.parent.is_dir():
        raise missing_folder(output.parent)
    if join:
        from know_cli.cli.eval_join import check_join, join_results

        check_join(context)
        join_results(talk, output, join, table, force=force)
        return
    if trajectory is not TrajectoryKind.FORGETTING:
        from know_cli.cli.eval_branches import evaluate_branches
        from know_cli.cli.eval_runs import check, evaluate_runs

        check(context, trajectory)
        common: dict[str, Any] = {
            "folder": output,
            "tasks": task or [],
            "seeds": wanted_seeds,
            "suite": suite.value,
            "length": length,
            "data_folder": data_folder,
            "processes": processes or usual_processes(device),
            "device": device,
            "precision": precision,
            "shard": part,
            "dry_run": dry_run,
            "table": table,
            "force": force,
        }
        if trajectory is TrajectoryKind.RUN:
            measures = measure or list(RunMeasure)
            evaluate_runs(talk, measures=measures, bundles=bundles, **common)
            return
        if measure:
            raise UsageError("--measure is for --trajectory run")
        evaluate_branches(talk, **common)
        return
    if regime is Regime.RELEASE:
        from know_cli.cli.eval_release import check_release, evaluate_release

        check_release(context)
        evaluate_release(
            talk,
            folder=output,
            tasks=task or [],
            methods=method or [],
            bundles=bundles,
            shares=share or [],
            seeds=wanted_seeds,
            suite=suite.value,
            data_folder=data_folder,
            processes=processes or usual_processes(device),
            shard=part,
            dry_run=dry_run,
            device=device,
            precision=precision,
            first=first,
            table=table,
            force=force,
        )
        return
    replaces = is_own_result(output / RESULTS)
    if share:
        raise UsageError("--share is for --regime release")
    if first is not None:
        raise UsageError("--from is for --regime release")
    if measure:
        raise UsageError("--measure is for --trajectory run")
    if length != 1:
        raise UsageError("--length is for --trajectory run and branches")
    from know_cli.cli.eval_plan import show_plan
    from know_cli.cli.eval_progress import display
    from know_cli.cli.eval_results import forgetting_table, shard_is_done, tell_of_other_torch
    from know_cli.engine.devices import choose_devices
    from know_cli.evaluation import results as of_results
    from know_cli.evaluation import suite as running
    from know_cli.evaluation.costs import costs
    from know_cli.evaluation.markdown import to_markdown
    from know_cli.evaluation.starts import SESSIONS, Wanted
    from know_cli.evaluation.tasks import find_tasks
    from know_cli.evaluation.variants import VARIANTS, find_variants, of_bundle
    from know_cli.files import json_text, printable_texts, write_text

    tell_of_other_torch(talk, output / RESULTS)
    variants = find_variants(method or [variant.label for variant in VARIANTS])
    labels = [variant.label for variant in VARIANTS]
    for name in bundles:
        if name in labels:
            raise UsageError(f"--bundle {name}=…: is already the name of a method")
    variants += [of_bundle(name, path) for name, path in bundles.items()]
    norms = dict.fromkeys(norm or [NormMode.RESCALE])
    chosen_seeds = wanted_seeds or range(running.SUITES[suite.value])
    request = running.Request(
        folder=output,
        tasks=find_tasks(task or []),
        seeds=len(chosen_seeds),
        first_seed=chosen_seeds.start,
        wanted=Wanted(
            variants=tuple(variants),
            steps=steps,
            norms=tuple(norms),
            sessions=tuple(dict.fromkeys(sessions or [SESSIONS])),
            keep=keep,
            budget=budget,
        ),
        data_folder=data_folder,
        processes=processes or usual_processes(device),
        devices=choose_devices(device),
        precision=precision,
        shard=part,
    )
    for words in running.check_methods(request):
        talk.notice(f"{words}, left out")
    not_run = running.not_here(request)
    request = running.without(request, not_run)
    for name, reason in not_run.items():
        talk.notice(f"{name}: not run here, {reason}")
    # A large task that was requested but lacks its data keeps that reason.
    not_run = running.not_asked_for(request) | not_run
    if not request.tasks:
        raise UsageError("none of these tasks can run here; see the notices above")
    if dry_run:
        show_plan(talk, request, costs("forgetting"))
        return

    outcomes: list[Outcome] = []
    with display(talk, request) as report:
        for outcome in running.evaluate(request):
            outcomes.append(outcome)
            report(outcome)
    if shard_is_done(talk, part):
        return
    content = of_results.to_json(request, outcomes, not_run)
    write_text(output / RESULTS, json_text(content, indent=1), replace=replaces)
    if table is not None:
        write_out(table, to_markdown(printable_texts(content)), force=force)
    for name, of_task in content["tasks"].items():
        talk.show("", f"{name}: {of_task['title']}", forgetting_table(of_task))
    talk.show("", f"wrote {output / RESULTS}")
    if table is not None:
        talk.show(f"wrote {'the tables' if talk.aside else table}")
