"""``know collect``: record many trajectories of small networks for meta-training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.checkpoints.metadata import Regime
from know_cli.cli.options import data_folder_option, parse_shard, quiet_option, usual_processes
from know_cli.cli.output import Output
from know_cli.errors import UsageError, counted
from know_cli.kinds import PREDICTED_KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from know_cli.meta.collecting import Collected
    from know_cli.meta.totals import Totals

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know collect trajectories --trajectories 400",
        "know train trajectories -o my-known --target continuation",
        "know collect runs --regime run --trajectories 400",
        "know collect branches --regime branches --trajectories 100 --side 16",
    )
)


class CollectedRegime(str, Enum):
    """Values of ``--regime``: those of :class:`Regime`, the release's two, runs and branches."""

    CHAIN = Regime.CHAIN.value
    COMMON_START = Regime.COMMON_START.value
    RELEASE = "release"
    RELEASE_CHAIN = "release-chain"
    RUN = "run"
    BRANCHES = "branches"


_REGIMES = {
    None: None,
    CollectedRegime.CHAIN: Regime.CHAIN,
    CollectedRegime.COMMON_START: Regime.COMMON_START,
    CollectedRegime.RELEASE: Regime.COMMON_START,
    CollectedRegime.RELEASE_CHAIN: Regime.CHAIN,
}
_ROWS_PER_TENSOR = 40_000


def collect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="For one file per trajectory, or a folder per run or set of branches.",
        ),
    ],
    trajectories: Annotated[
        int, typer.Option(min=1, help="Number of trajectories over all shards.")
    ] = 400,
    data_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Draw from this data set; repeatable.",
            show_default="all that are found",
        ),
    ] = None,
    data_folder: Annotated[Path | None, data_folder_option()] = None,
    architecture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Draw from this architecture; repeatable.",
            show_default="all",
        ),
    ] = None,
    regime: Annotated[
        CollectedRegime | None,
        typer.Option(
            help="Only chains, where each session continues from the previous one, only sessions "
            "from a common start; either as the method's authors record them (release-chain, or as "
            "their sample script does, release); or ordinary runs, or several branches of one run, "
            "instead.",
            show_default="both of forgettings",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole collection.")] = 0,
    rows_per_tensor: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=str(_ROWS_PER_TENSOR),
            help="The most elements kept of a tensor; of runs and branches all are.",
        ),
    ] = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Collect only every N-th trajectory, starting at the I-th: one machine's share.",
        ),
    ] = "1/1",
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Trajectories to train at the same time, with one thread each.",
            show_default="one per core, or per card",
        ),
    ] = None,
    checkpoints: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Checkpoints of each run's window; or Θ0 and the branches from it.",
            show_default="drawn, 2 to 5; of branches 6",
        ),
    ] = None,
    brief: Annotated[
        bool,
        typer.Option(
            "--brief",
            help="Of what comes after a run's window, record one annealing only (20 %): enough "
            "for 'know train --objective network', in two thirds of the time.",
        ),
    ] = False,
    side: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Reduce images to so many pixels a side, which makes runs several times as cheap.",
            show_default="as they are",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1000,
            help="With --regime release and release-chain: the most samples that the first session "
            "has. 'know train --objective network' teaches with the others.",
            show_default="all",
        ),
    ] = None,
    largest_batch: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Likewise: the largest batch that is drawn. A session of the release's may be of "
            "a few steps only.",
            show_default="the last session's samples",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda[:i]|mps|xpu",
            help="Where networks are trained; several --processes share a card.",
        ),
    ] = "cpu",
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Record how small networks forget, for 'know train': many architectures, data and recipes.

    The seed and its number determine everything about a trajectory. An interrupted run continues
    where it stopped: trajectories that are already in FOLDER are not collected again, and one that
    was being trained continues from its last session. Nothing is downloaded: Fashion-MNIST is
    found where Debian's package dataset-fashion-mnist installs it, others in --data-folder.

    With --regime release, seven sessions of one epoch each start from the same fresh weights, at a
    constant rate, with the release's changes of images, as in its authors' sample script; with
    --regime release-chain each goes on from the one before, as in the paper. Trajectories of the
    same number have the same setup in both.

    With --regime run, networks are trained once, at a constant or slowly falling rate. Each run's
    folder gets a window of 2 to 5 checkpoints, the newest one annealed by 5, 10, 20 and 40 % more
    steps, the mean of as many checkpoints after it, and in run.json the setup and the losses.

    With --regime branches, a network is trained at a constant rate, and then several branches go
    on from it, each in another order, in half of the setups on a random half of the samples. Each
    folder gets it and the branches, one continuation of as many steps as all branches together,
    the same annealed, and in branched.json the setup and the losses.
    """
    talk = Output(quiet)
    parsed = parse_shard(shard)
    from know_cli.engine.devices import choose_devices
    from know_cli.lab.data import available
    from know_cli.meta.collecting import Request, existing
    from know_cli.meta.collecting import collect as collect_all
    from know_cli.meta.totals import Totals

    data_sets = tuple(sorted(set(data_set))) if data_set else tuple(available(data_folder))
    architectures = tuple(sorted(set(architecture))) if architecture else None
    chosen, *others = choose_devices(device)
    if others:
        raise UsageError(
            f"--device {device}: choose one, such as cuda:0; --shard shares trajectories between "
            "several"
        )
    like_release = regime in (CollectedRegime.RELEASE, CollectedRegime.RELEASE_CHAIN)
    if (samples, largest_batch) != (None, None) and not like_release:
        raise UsageError("--samples and --largest-batch are for --regime release and release-chain")
    if brief and regime is not CollectedRegime.RUN:
        raise UsageError("--brief is for --regime run")
    if regime in (CollectedRegime.RUN, CollectedRegime.BRANCHES):
        if rows_per_tensor is not None:
            raise UsageError(
                f"--rows-per-tensor: of {regime.value}{'s' * (regime is CollectedRegime.RUN)} all "
                "elements are kept; leave it out"
            )
        from know_cli.cli.collect_runs import collect_runs
        from know_cli.meta.branch_collecting import BranchRequest
        from know_cli.meta.branch_setup import CHECKPOINTS
        from know_cli.meta.run_collecting import CollectingRequest, RunRequest

        shared: dict[str, Any] = {
            "folder": folder,
            "runs": trajectories,
            "data_sets": data_sets,
            "data_folder": data_folder,
            "architectures": architectures,
            "seed": seed,
            "shard": parsed,
            "processes": processes or usual_processes(device),
            "side": side,
            "device": chosen,
        }
        runs: CollectingRequest[Any]
        if regime is CollectedRegime.RUN:
            runs = RunRequest(**shared, checkpoints=checkpoints, brief=brief)
        elif checkpoints == 2:
            raise UsageError(
                "--checkpoints 2: would be Θ0 and a single branch; give 3 or more with --regime "
                "branches"
            )
        else:
            runs = BranchRequest(**shared, checkpoints=checkpoints or CHECKPOINTS)
        if not runs.numbers():
            raise UsageError(
                f"--shard {shard}: there {'is' if trajectories == 1 else 'are'} only "
                f"{runs.trajectory.counted(trajectories)}"
            )
        collect_runs(talk, runs)
        return
    if checkpoints is not None:
        raise UsageError("--checkpoints is for --regime run and branches")
    if side is not None and not like_release:
        raise UsageError("--side is for --regime run, branches, release and release-chain")
    request = Request(
        folder=folder,
        trajectories=trajectories,
        data_sets=data_sets,
        data_folder=data_folder,
        architectures=architectures,
        regime=_REGIMES[regime],
        like_release=like_release,
        side=side,
        most_samples=samples,
        largest_batch=largest_batch,
        seed=seed,
        rows_per_tensor=rows_per_tensor or _ROWS_PER_TENSOR,
        shard=parsed,
        processes=processes or usual_processes(device),
        device=chosen,
    )
    if not request.numbers():
        raise UsageError(
            f"--shard {shard}: there {'is' if trajectories == 1 else 'are'} only "
            f"{counted(trajectories, 'trajectory', 'trajectories')}"
        )
    totals = Totals(len(request.numbers()))
    for one in existing(request):
        totals.add(one)
    talk.notice(f"data sets: {', '.join(data_sets)}")
    if totals.done:
        there = f"{counted(totals.done, 'trajectory', 'trajectories')} "
        there += "is" if totals.done == 1 else "are"
        talk.notice(f"{folder}: {there} already there, continuing")
    began = time.perf_counter()
    with _display(talk, totals, request.processes) as report:
        for one in collect_all(request):
            totals.add(one)
            report(one)
    seconds = time.perf_counter() - began
    from know_cli.cli.tables import count_text

    rows = ", ".join(f"{count_text(count)} {kind.value}" for kind, count in totals.rows.items())
    talk.show(
        _table(totals),
        "",
        f"{folder}: {totals.done} of {counted(totals.wanted, 'trajectory', 'trajectories')}, "
        f"{totals.left_out} of them left out; parameters: {rows or 'none'}; {seconds:.0f} s",
    )


@contextmanager
def _display(talk: Output, totals: Totals, processes: int) -> Iterator[Callable[[Collected], None]]:
    """A live table on a terminal, one line per trajectory elsewhere."""
    if talk.quiet or not sys.stderr.isatty():
        yield lambda one: talk.notice(_line(one, totals, processes))
        return
    from rich.live import Live

    console = talk.console(stderr=True)
    with Live(_picture(totals, processes), console=console, transient=True) as live:
        yield lambda one: live.update(_picture(totals, processes))


def _picture(totals: Totals, processes: int) -> RenderableType:
    from rich.console import Group

    return Group(_table(totals), "", _progress(totals, processes))


def _progress(totals: Totals, processes: int) -> str:
    left = totals.seconds_left(processes)
    time_left = "" if left is None else f", about {left / 60:.0f} min left"
    return f"{totals.done} of {totals.wanted}{time_left}"


def _line(one: Collected, totals: Totals, processes: int) -> str:
    from know_cli.cli.tables import count_text

    what = f"left out: {one.reason}"
    if not one.reason:
        setup, recorded = one.facts["setup"], one.facts["recorded"]
        first = recorded["0"]["measurements"]
        rows = " + ".join(f"{count_text(count)} {kind.value}" for kind, count in one.rows.items())
        what = (
            f"{setup['design']['architecture']} on {setup['data_set']}, "
            f"{setup['samples']} samples, rate {setup['rate']:.2f}, test accuracy "
            f"{first['test_accuracy']:.3f}{_more(recorded)}; {rows}"
        )
    return f"{one.number:05d} {what}; {one.seconds or 0:.0f} s; {_progress(totals, processes)}"


def _more(recorded: Mapping[str, Any]) -> str:
    """What Θ0 trained longer and on more data came to, where it was."""
    if "-1" not in recorded:
        return ""
    longer = recorded["0"]["measurements"]["longer_test_accuracy"]
    return f", longer {longer:.3f}, more data {recorded['-1']['measurements']['test_accuracy']:.3f}"


def _table(totals: Totals) -> Table:
    """One row per architecture; accuracies on samples that no session trains on."""
    from know_cli.cli.tables import count_text, new_table

    table = new_table(
        "architecture", "trajectories", "data-limited", *(kind.value for kind in PREDICTED_KINDS),
        "Θ0", "most forgotten", "trained longer", "more data",
    )  # fmt: skip
    for name, line in sorted(totals.lines.items()):
        table.add_row(
            name,
            str(line.trajectories),
            f"{line.data_limited / line.trajectories:.0%}",
            *(count_text(line.rows.get(kind, 0)) for kind in PREDICTED_KINDS),
            *(_share(line.mean(key)) for key in ("full", "last", "longer", "continued")),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
