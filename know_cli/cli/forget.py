"""``know forget``: record structured forgetting with your own training function."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.cli.options import parse_rate, quiet_option, torch_threads_option
from know_cli.cli.output import Output
from know_cli.errors import UsageError, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from know_cli.forgetting.recorder import TrainingSession
    from know_cli.forgetting.runner import Measurements

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know forget train.py:train run --size 50000 --sessions 5 --rate 0.5",
        "know-predict run/ckpt0..ckpt4 -o predicted.safetensors",
        "know forget train.py:train run --size 50000 --from public.safetensors",
        "know forget train.py:train run --size 50000 --branches 4",
        "know-predict run/ckpt0 run/branch1..branch4 -o fused.safetensors",
    )
)


_SESSIONS, _RATE, _BRANCHES = 5, "0.5", 4


def forget(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FUNCTION",
            help="Your training function, module:function or file.py:function. It takes a session "
            "(index, fraction, indices, start, seed, options) and returns the trained model or "
            "its state dict, or a pair of that and a dictionary of measurements.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="For ckpt0.safetensors and so on.")
    ],
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of training samples, if the function does not declare it."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npy|MODULE:NAME",
            help="Class of each sample, so that subsets keep the classes' shares.",
        ),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=str(_SESSIONS),
            help="Number of sessions, including the one on the full data.",
        ),
    ] = None,
    trajectory: Annotated[
        TrajectoryKind | None,
        typer.Option(
            show_default="forgetting, or with --branches branches",
            help="What to record. A run is recorded by its trainer, or a callback.",
        ),
    ] = None,
    branches: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            show_default=f"{_BRANCHES} with --trajectory branches",
            help="Instead of a forgetting, record K branches: trainings that all go on from the "
            "first model, each on the data in another order, or with --rate on a random share "
            "of it.",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            show_default=f"{_RATE}; of branches all samples",
            help="Share of the previous session's samples that a session keeps, in (0, 1); with "
            "--trajectories also a range to draw from, such as 0.3..0.9.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the subsets and of the training.")] = 0,
    before: Annotated[
        int,
        typer.Option(
            min=0,
            help="Hold back this many larger data sets from the sessions, and train the first "
            "model further on each: 'know train --target continuation' learns from these.",
        ),
    ] = 0,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="Start every session from this .safetensors file instead of the previous session; "
            "with --branches the same as --from.",
        ),
    ] = None,
    first: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="CKPT",
            help="A model that is trained already, such as a public one: a .safetensors file, or a "
            "folder of them. It is session 0, which is then not trained, or what branches go on "
            "from.",
        ),
    ] = None,
    trajectories: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Record several trajectories, each with its own seed, in FOLDER/0000 and so on.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Passed to your function as text; repeatable."),
    ] = None,
    threads: Annotated[int | None, torch_threads_option()] = None,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Record how a model forgets: train it on ever smaller nested subsets of its data.

    Or, with --branches, record how it goes on from one point in several ways. Sessions that are
    already in FOLDER are not trained again, so an interrupted run continues where it stopped.
    """
    output = Output(quiet)
    options = parse_options(option or [])
    branches = _number_of_branches(trajectory, branches)
    if branches is None:
        rates = parse_rates(rate or _RATE)
    else:
        if sessions is not None or before:
            other = "--sessions" if sessions is not None else "--before"
            raise UsageError(f"{other}: is for a forgetting; leave it out with --branches")
        rates = (1.0, 1.0) if rate in (None, "1", "1.0") else parse_rates(rate)
    if start is not None and first is not None:
        raise UsageError(
            "--start and --from exclude each other: all sessions would begin at the one, and "
            "session 1 at the other; leave one out"
        )
    if trajectories is None and rates[0] != rates[1]:
        raise UsageError(f"--rate {rate}: a range needs --trajectories")
    import torch

    from know_cli.forgetting.runner import Protocol, load_function, open_recorder, record

    if threads:
        torch.set_num_threads(threads)
    # A training function, or its module when it is imported, may change the working folder.
    place = folder.absolute()
    start, first = (path and path.absolute() for path in (start, first))
    classes = None if labels is None else load_labels(labels)
    loaded = load_function(function)
    protocol = Protocol(
        sessions=sessions or _SESSIONS,
        branches=branches or 0,
        rates=rates,
        seed=seed,
        before=before,
        options=options,
        size=size,
        labels=classes,
        start=start if branches is None else None,
        first=first if branches is None else first or start,
    )
    numbers: list[int | None] = [None] if trajectories is None else list(range(trajectories))
    began, trained, kept = time.perf_counter(), 0, 0
    for number in numbers:
        recorder = open_recorder(loaded, place, protocol, number)
        shown = folder if number is None else folder / recorder.folder.name
        done = len(recorder.done)
        if done and number is None:
            there = f"{counted(done, 'session')} {'is' if done == 1 else 'are'}"
            output.notice(f"{shown}: {there} already there, continuing")
        kept += done

        def report(
            session: TrainingSession, measurements: Measurements, folder: Path = shown
        ) -> None:
            numbers = "".join(
                f"  {name} {value:.4g}"
                for name, value in measurements.items()
                if isinstance(value, float) and (trajectories is None or "accuracy" in name)
            )
            output.notice(
                f"{folder}: {session.name:14} {len(session.indices):7} samples "
                f"{session.fraction:8.4g} of the data{numbers}"
            )

        trained += record(loaded, recorder, report)
    seconds = time.perf_counter() - began
    what = ""
    if trajectories is not None:
        what = f"{counted(trajectories, 'trajectory', 'trajectories')}, "
    done_now = counted(trained, "session" if branches is None else "model")
    output.show(f"{folder}: {what}{done_now} trained in {seconds:.1f} s, {kept} kept")


def _number_of_branches(trajectory: TrajectoryKind | None, branches: int | None) -> int | None:
    """How many branches to record; None is a forgetting.

    Raises:
        UsageError: the options contradict each other, or ask for a run.
    """
    if trajectory is TrajectoryKind.RUN:
        raise UsageError(
            "--trajectory run: a run needs no sessions; keep the checkpoints that its trainer "
            "saves, or take a callback of know_cli.callbacks, and give them to 'know predict'"
        )
    if trajectory is TrajectoryKind.FORGETTING and branches is not None:
        raise UsageError("--branches: is for branches; leave it or --trajectory forgetting out")
    if trajectory is TrajectoryKind.BRANCHES:
        return branches or _BRANCHES
    return branches


def parse_rates(text: str) -> tuple[float, float]:
    """``0.5`` → (0.5, 0.5); ``1/3..0.9`` → (0.333…, 0.9).

    Raises:
        UsageError: these are not sampling rates in ascending order.
    """
    parts = text.split("..")
    try:
        lowest, highest = parse_rate(parts[0]), parse_rate(parts[-1])
    except typer.BadParameter:
        lowest = highest = 0.0
    if len(parts) > 2 or not 0 < lowest <= highest:
        raise UsageError(
            f"--rate {text}: write a number from 0.01 to below 1, such as 0.5 or 1/3, or a "
            "range: 0.3..0.9"
        )
    return lowest, highest


def parse_options(pairs: list[str]) -> dict[str, str]:
    """``["key=value", …]`` as a dictionary.

    Raises:
        UsageError: there is no ``=``, or a key occurs twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in options:
            raise UsageError(f"--option {pair}: write KEY=VALUE, each key once")
        options[key] = value
    return options


def load_labels(source: str) -> NDArray[Any]:
    """Read labels from ``FILE.npy``, or take ``MODULE:NAME`` from a module.

    Raises:
        UsageError: they cannot be read or are not one class per sample.
    """
    import numpy as np

    from know_cli.forgetting.runner import as_labels, load_object

    try:
        found = np.load(source, allow_pickle=False) if source.endswith(".npy") else None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--labels {source}: cannot be read: {error}") from error
    if found is not None and not isinstance(found, np.ndarray):
        raise UsageError(f"--labels {source}: is an archive of arrays; save one as .npy")
    return as_labels(load_object(source) if found is None else found, f"--labels {source}")
