"""``know choose``: which start is best for the user's own task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.choose_options import measure_of, parse_grid
from know_cli.cli.options import (
    max_memory_option,
    no_progress_option,
    quiet_option,
    threads_option,
    usable_cores,
)
from know_cli.cli.output import Output
from know_cli.engine.settings import NormMode
from know_cli.errors import EXIT_NOT_BETTER, counted

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know choose run/ckpt0..ckpt4 -o start.safetensors "
        "--measure 'python fine_tune.py --init {start} --seed {seed}'",
        "know choose run/ckpt0..ckpt4 -o start.safetensors --tune lr=1e-4,3e-4,1e-3 "
        "--measure 'python fine_tune.py --init {start} --seed {seed} --lr {lr}'",
        "know choose run/ckpt0..ckpt4 -o start.safetensors --evaluate measure.py:accuracy "
        "--budget 40 --candidate average --candidate shrink,lambda=0.9",
        "The measure is the last line that the command writes to standard output. Larger is "
        "better, unless --minimise says otherwise.",
        "Exit codes: 0 done, 1 a bug, 2 wrong usage, 3 checkpoints that cannot be used, "
        "4 output that cannot be written, 5 nothing is better and --only-if-better was given, "
        "130 interrupted.",
    )
)

_MEASURE = "What is measured"
_SEARCH = "How it is searched"
_MACHINE = "Where it runs"
_TALK = "What it says"


def choose(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            show_default=False,
            help="2 to 16 checkpoints of one model, or with --trajectory run a run's folder, as "
            "for 'know predict'.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            show_default=False,
            help="File or folder to write: the chosen start, or the first checkpoint where none "
            "is better.",
        ),
    ],
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            show_default=False,
            help="Shell command that measures a start: {start} is its path, {seed} a number.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            show_default=False,
            help="Function (state dict, seed) that returns the measure, instead of a command.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            show_default=False,
            help="Measures the confirmation, such as on other data. Without it, the measure's "
            "own command confirms, with other seeds.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    measure_json: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            show_default=False,
            help="The measure is this key of the last JSON line on standard output.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    minimise: Annotated[
        bool,
        typer.Option("--minimise", help="Smaller is better.", rich_help_panel=_MEASURE),
    ] = False,
    measure_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            show_default=False,
            help="A measure that takes longer counts as failed.",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD,OPTION=VALUE,steps=N",
            show_default=False,
            help="A candidate, instead of the usual ones; 'usual' adds these. Repeatable.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Measures to take in all.", rich_help_panel=_SEARCH),
    ] = 40,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V1,V2,V3",
            show_default=False,
            help="A placeholder {NAME} of the measure, such as the learning rate; every start "
            "gets its own best value. Repeatable.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="First seed.", rich_help_panel=_SEARCH)
    ] = 0,
    only_if_better: Annotated[
        bool,
        typer.Option(
            "--only-if-better",
            help="Where nothing is better, write nothing and end with exit code 5.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    norm: Annotated[
        NormMode | None,
        typer.Option(
            show_default="each method's own",
            help="Normalisation layers, as for 'know predict'.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    trajectory: Annotated[
        TrajectoryKind | None,
        typer.Option(
            show_default="the checkpoints' own, else forgetting",
            help="How the checkpoints came about.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default="OUT.search",
            help="Keeps the measures, so that the same command goes on, and the candidates.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="none|best|all",
            help="Candidates that stay in the folder at the end.",
            rich_help_panel=_MACHINE,
        ),
    ] = "none",
    jobs: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Measures to take at once.", rich_help_panel=_MACHINE
        ),
    ] = 1,
    device_variable: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Environment variable that tells each of the jobs its number, from 0, such as "
            "CUDA_VISIBLE_DEVICES.",
            rich_help_panel=_MACHINE,
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    threads: Annotated[int | None, threads_option(_MACHINE)] = None,
    max_memory: Annotated[int, max_memory_option(_MACHINE)] = 1 << 30,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE.json",
            show_default=False,
            help="Write the report as JSON; - is standard output.",
            rich_help_panel=_TALK,
        ),
    ] = None,
    quiet: Annotated[bool, quiet_option(_TALK)] = False,
    no_progress: Annotated[bool, no_progress_option(_TALK)] = False,
) -> None:
    """Choose the best start for your own task among everything your checkpoints can give.

    Makes candidates (predictions, averages, the checkpoints themselves), measures them with your
    own command, drops the worse half of them round by round, and confirms the best one with seeds
    that took no part in choosing. Where it is not better than the first checkpoint, it says so
    and writes the first checkpoint.
    """
    from know_cli.checkpoints.arguments import find_checkpoints
    from know_cli.checkpoints.paths import search_path
    from know_cli.choosing.candidates import choose_candidates
    from know_cli.choosing.intervals import check_intervals
    from know_cli.choosing.made import Made, check_inputs, check_places
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_report
    from know_cli.engine.settings import Settings
    from know_cli.errors import UsageError
    from know_cli.plots.choice import REPORT

    talk = Output(quiet, aside=takes_stdout(json))
    if folder is not None:
        check_places(output, folder)
    paths, trajectory = find_checkpoints(checkpoints, trajectory, talk.notice)
    if keep not in ("none", "best", "all"):
        raise UsageError(f"--keep {keep}: is none of none, best, all")
    if (measure is None) == (evaluate is None):
        raise UsageError("give one of --measure COMMAND and --evaluate MODULE:FUNCTION")
    if measure_json is not None and measure is None and confirm is None:
        raise UsageError(
            f"--measure-json {measure_json}: is read from what a command writes, and --evaluate's "
            "function returns the measure; leave it out"
        )
    if "=" in device_variable:
        raise UsageError(
            f"--device-variable {device_variable}: is no name of a variable; each of the jobs is "
            "told its own number, so give the name alone"
        )
    grid = parse_grid(tune or ())
    names = tuple(name for name, _ in grid[0])
    place = folder or search_path(output)
    if json is not None:
        check_report_path(json, [*paths, output, place], force=force)
    check_intervals()
    measuring = measure_of(measure, evaluate, names, measure_json, measure_timeout, device_variable)
    confirming = None
    if confirm is not None:
        confirming = measure_of(
            confirm, None, names, measure_json, measure_timeout, device_variable, "--confirm"
        )
    for option, command in (("--measure", measure), ("--confirm", confirm)):
        if command is not None and "{seed}" not in command:
            talk.notice(
                f"{option}: has no {{seed}}; where it gives the same number every time, any "
                "difference looks certain"
            )
    if not names:
        talk.notice(
            "every start is measured with the same settings; a start's scale and the learning rate "
            "are exchangeable in networks with normalisation layers, so tune the rate for each "
            "start with --tune NAME=V1,V2,V3"
        )

    from know_cli.checkpoints import open_trajectory
    from know_cli.checkpoints.output_checks import check_output, name_notices
    from know_cli.choosing import search as searching
    from know_cli.choosing.log import Log
    from know_cli.choosing.making import Maker, identity_of, write_chosen
    from know_cli.choosing.running import BaseMeasureError, Runner
    from know_cli.cli.choice_tables import Watch, evidence_of, outcome_json, outcome_tables
    from know_cli.cli.progress import progress_for
    from know_cli.files import make_folder

    settings = searching.Settings(budget, first_seed=seed)
    with open_trajectory(paths, kind=trajectory) as opened:
        check_output(output, opened.checkpoints, is_folder=opened.first.is_folder, force=force)
        for notice in () if opened.first.is_folder else name_notices(output):
            talk.notice(notice)
        kind = opened.kind
        candidates = choose_candidates(candidate or (), len(paths), kind)
        weights = identity_of(opened, candidates)
    # An impossible budget is refused before anything is made.
    procedure = searching.search([one.name for one in candidates], grid, settings)
    next(procedure)
    procedure.close()
    check_inputs(paths, place)
    make_folder(place)
    made = Made(place, str(weights["files"]))
    maker = Maker(
        paths,
        place / "candidates",
        Settings(norm=norm, max_memory=max_memory, threads=threads or usable_cores()),
        kind,
        talk.notice,
        made,
    )
    made.check([*maker.paths(candidates), place / REPORT])
    make_folder(maker.folder)
    identity = {
        **weights,
        "candidates": [one.text for one in candidates],
        "measure": measure or evaluate,
        "confirm": confirm,
        "key": measure_json,
        "minimise": minimise,
        "tune": list(tune or ()),
        "budget": budget,
        "seed": seed,
        "norm": norm.value if norm else None,
        "trajectory": kind.value,
    }
    log = Log(place / "measures.jsonl", identity)
    try:
        if len(log):
            were = "was" if len(log) == 1 else "were"
            talk.notice(f"goes on with {counted(len(log), 'measure')} that {were} taken before")
        with progress_for(talk, bar=not no_progress) as progress:
            starts = maker.make(candidates, progress)
        base = starts[searching.BASE]
        with progress_for(talk, bar=not no_progress, unit="measures") as progress:
            runner = Runner(
                starts,
                measuring,
                confirming,
                minimise,
                jobs,
                log,
                lambda winner: maker.random_direction(base, starts[winner], seed),
                Watch(progress, talk, budget),
            )
            try:
                outcome = runner.run(
                    searching.search([one.name for one in candidates], grid, settings)
                )
            except BaseMeasureError as error:
                for line in error.result.output.splitlines():
                    talk.explain(line)
                raise
    finally:
        log.close()
        measuring.close()
        if confirming is not None:
            confirming.close()
    talk.show(*outcome_tables(outcome, minimise=minimise))
    content = outcome_json(outcome, minimise=minimise)
    written = None
    if outcome.is_better or not only_if_better:
        chosen = outcome.winner.start if outcome.winner and outcome.is_better else searching.BASE
        write_chosen(starts[chosen], output, evidence_of(outcome, minimise=minimise), force=force)
        written = starts[chosen]
        talk.show(f"wrote {output}: {chosen if chosen != searching.BASE else 'Θ0, unchanged'}")
    if keep != "all":
        maker.clean([written] if written and keep == "best" else [])
    content["output"] = str(output) if written else None
    with made.writing(place / REPORT):
        write_report(place / REPORT, content, force=True)
    if json is not None:
        write_report(json, content, force=force)
    if written is None:
        raise typer.Exit(EXIT_NOT_BETTER)
