"""``know bench``: how fast the engine is on this machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from know_cli.cli.options import max_memory_option, quiet_option, threads_option, usable_cores
from know_cli.cli.output import Output
from know_cli.engine.device_names import DEVICE_NAMES, check_device_name
from know_cli.errors import OutputError, UsageError
from know_cli.files import missing_folder

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know bench",
        "know bench --threads 1 --json bench.json --table know_cli/engine/RESULTS.md",
        "know bench --device cuda --rows 10000000",
        "know bench --sizes 1e5,1e6,1e7,1e8,1e9 --folder /fast/disk --plot cost.svg",
        "The Keras model of the paper's authors is measured, too, where tensorflow and tf_keras "
        "are installed.",
    )
)
_CHECKPOINTS = 5
_FEWEST, _MOST = 1_000, 10**11
_MOST_RUN_ROUNDS = 3
# Inputs, output, and its temporary beside the one before.
_FILES = _CHECKPOINTS + 2


def bench(
    sizes: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            help="Parameters of the generated checkpoints, such as 1e5,1e9; each takes 28 bytes "
            "of disk. 0 leaves whole predictions out.",
        ),
    ] = "1e5,1e6,1e7",
    rows: Annotated[
        int,
        typer.Option(
            metavar="N", min=1_000, max=10**8, help="Parameters that the kernel is measured on."
        ),
    ] = 200_000,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help=f"Repetitions; of whole predictions at most {_MOST_RUN_ROUNDS}, of 1e8 "
            "parameters or more one.",
        ),
    ] = 7,
    threads: Annotated[int | None, threads_option()] = None,
    max_memory: Annotated[int, max_memory_option()] = 1 << 30,
    device: Annotated[
        str,
        typer.Option(
            metavar=DEVICE_NAMES,
            help="Where whole predictions run, as for 'know predict'; what is not the CPU is "
            "measured alone, too.",
        ),
    ] = "cpu",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            show_default="the shipped default",
            help=f"KNOWN for {_CHECKPOINTS} checkpoints, as for 'know predict'.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="the system's for temporary files",
            help="Where the generated checkpoints are written; they are removed again.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", show_default=False, help="Write all as JSON."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write the tables as Markdown."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Draw seconds against parameters; needs matplotlib.",
        ),
    ] = None,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Measure how fast the engine is on this machine.

    Measures the kernel in memory against the reference module and the rate of a matrix product,
    and whole predictions of generated checkpoints against a bare copy of the same bytes. What is
    compared takes turns, so that other work on the machine meets all of it.
    """
    from know_cli.cli.report_file import check_report_path, takes_stdout, write_out, write_report

    talk = Output(quiet, aside=takes_stdout(json, table))
    check_device_name(device)
    wanted = _parse_sizes(sizes)
    for path, option in ((json, "--json"), (table, "--table"), (plot, "--plot")):
        if path is not None:
            check_report_path(path, [], option)
    if plot is not None and not wanted:
        raise UsageError("--plot: there is nothing to draw with --sizes 0")
    place = Path(tempfile.gettempdir()) if folder is None else folder
    _check_space(place, max(wanted, default=0))

    import torch

    from know_cli.benchmark.devices import measure_device
    from know_cli.benchmark.halves import measure_errors
    from know_cli.benchmark.kernels import measure_kernels, random_walks
    from know_cli.benchmark.results import draw, to_json, to_markdown
    from know_cli.benchmark.runs import measure_runs
    from know_cli.bundles import find_bundle
    from know_cli.engine.devices import choose_devices
    from know_cli.hypermodel import load_bundle
    from know_cli.methods.prediction import DEFAULT_WEIGHTS

    (of_device, *_) = choose_devices(device)
    workers = threads or usable_cores()
    bundle = load_bundle(find_bundle(weights or DEFAULT_WEIGHTS, _CHECKPOINTS))
    if bundle.checkpoints != _CHECKPOINTS:
        raise UsageError(
            f"--weights {weights}: reads {bundle.checkpoints} checkpoints; name one for "
            f"{_CHECKPOINTS}"
        )
    talk.notice(f"kernel: {rounds} rounds of {rows:,} parameters")
    kernels = measure_kernels(bundle, rows, rounds, workers)
    history = random_walks(_CHECKPOINTS, rows, torch.Generator().manual_seed(0))
    halves = {bundle.preparation: measure_errors(bundle, bundle.preparation, history)}
    on_device = {}
    if of_device.type != "cpu":
        talk.notice(f"{of_device}: {rounds} rounds of {rows:,} parameters")
        on_device = {str(of_device): measure_device(bundle, of_device, rows, rounds)}
    runs = []
    for size in wanted:
        talk.notice(f"predictions of {size:,} parameters")
        with tempfile.TemporaryDirectory(prefix="know-bench-", dir=place) as temporary:
            runs.append(
                measure_runs(
                    Path(temporary), size, weights, _CHECKPOINTS, workers, max_memory,
                    min(rounds, _MOST_RUN_ROUNDS), device,
                )
            )  # fmt: skip
    settings = {"checkpoints": _CHECKPOINTS, "rows": rows, "rounds": rounds, "threads": workers}
    results = to_json(kernels, halves, on_device, runs, settings)
    talk.show(*_tables(results))
    if json is not None:
        write_report(json, results)
    if table is not None:
        write_out(table, to_markdown(results))
    if plot is not None:
        draw(results, plot)


def _parse_sizes(text: str) -> list[int]:
    """Numbers of parameters from ``1e5,2000000``, ascending; none from ``0``.

    Raises:
        UsageError: one is not a whole number from a thousand to a hundred thousand million.
    """
    if text.strip() == "0":
        return []
    sizes = set()
    for part in text.split(","):
        try:
            size = float(part)
        except ValueError:
            size = -1.0
        if not _FEWEST <= size <= _MOST or size != int(size):
            raise UsageError(
                f"--sizes {text}: {part.strip()!r} is not a number of parameters from 1e3 to 1e11"
            )
        sizes.add(int(size))
    return sorted(sizes)


def _check_space(folder: Path, parameters: int) -> None:
    if not folder.is_dir():
        raise missing_folder(folder)
    needed, free = parameters * 4 * _FILES, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder}: {parameters:,} parameters need {needed} bytes of disk, {free} are free; "
            "name smaller --sizes or another --folder"
        )


def _tables(results: dict[str, Any]) -> list[Table | str]:
    """The Markdown's tables for a terminal, with the sentences around them."""
    from know_cli.benchmark.results import to_markdown
    from know_cli.cli.tables import new_table

    shown: list[Table | str] = []
    rows: list[list[str]] = []
    for line in [*to_markdown(results).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            made = new_table(*rows[0])
            for row in rows[2:]:
                made.add_row(*row)
            shown.append(made)
            rows = []
        shown.append(line.lstrip("# "))
    return shown
