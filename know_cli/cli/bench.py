"""``know bench``: how fast the engine is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Annotated

import typer

from know_cli.cli.options import (
    force_option,
    max_memory_option,
    quiet_option,
    threads_option,
    usable_cores,
)
from know_cli.cli.output import Output
from know_cli.engine.devices import DEVICE_NAMES, check_device_name
from know_cli.errors import OutputError, UsageError, counted
from know_cli.files import free_bytes, missing_folder, scratch_folder, temporary_place

if TYPE_CHECKING:
    from rich.console import RenderableType

    from know_cli.benchmark.tables import Section

EPILOG = "\n\n".join(
    (
        "Examples:",
        "know bench",
        "know bench --threads 1 --json bench.json --table bench.md",
        "know bench --device cuda",
        "know bench --sizes 1e5,1e6,1e7,1e8,1e9 --folder /fast/disk",
        "know bench --sizes 0 --averages 2e8",
    )
)
_CHECKPOINTS = 5
_FEWEST, _MOST = 1_000, 10**11
_MOST_RUN_ROUNDS = 3
_DEVICE_ROWS = 10_000_000
# Inputs, the previous output, and the temporary of the next.
_FILES = _CHECKPOINTS + 2


def bench(
    sizes: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            help="Parameters of the generated checkpoints, such as 1e5,1e9, at 28 bytes of disk "
            "per parameter. 0 skips whole predictions.",
        ),
    ] = "1e5,1e6,1e7",
    averages: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            help="Parameters of language models of which five folders in bfloat16 are averaged, "
            "with mergekit, too, where it is installed (extra 'bench'). 0 skips that.",
        ),
    ] = "0",
    rows: Annotated[
        int,
        typer.Option(
            metavar="N", min=1_000, max=10**8, help="Parameters to measure the kernel on."
        ),
    ] = 200_000,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help=f"Repetitions; at most {_MOST_RUN_ROUNDS} of whole predictions, and 1 from 1e8 "
            "parameters on.",
        ),
    ] = 7,
    threads: Annotated[int | None, threads_option()] = None,
    max_memory: Annotated[int, max_memory_option()] = 1 << 30,
    device: Annotated[
        str,
        typer.Option(
            metavar=DEVICE_NAMES,
            help="Where whole predictions run, as for 'know predict'; a device other than the CPU "
            "is also measured alone.",
        ),
    ] = "cpu",
    device_rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1_000,
            max=10**8,
            show_default=str(_DEVICE_ROWS),
            help="With --device: parameters to measure it alone on; few do not fill one.",
        ),
    ] = None,
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
            show_default="the system's folder for temporary files",
            help="Where the generated checkpoints are written, and then removed.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", show_default=False, help="Write the results as JSON."
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Write the tables as Markdown."),
    ] = None,
    force: Annotated[bool, force_option()] = False,
    quiet: Annotated[bool, quiet_option()] = False,
) -> None:
    """Measure how fast the engine is on this machine.

    Measures the kernel in memory against the reference module and the rate of a matrix product,
    and whole predictions of generated checkpoints against a bare copy of the same bytes; with
    several threads also what these give over one, and each stage around the kernel. All of them
    take turns, so that other work on the machine affects them alike.
    """
    from know_cli.cli.report_file import check_reports, takes_stdout, write_out, write_report

    talk = Output(quiet, aside=takes_stdout(json, table))
    check_device_name(device)
    wanted = _parse_sizes(sizes, "--sizes")
    averaged = _parse_sizes(averages, "--averages")
    check_reports(json, table, [], force=force)
    place = temporary_place() if folder is None else folder
    _check_space(place, max([*wanted, *averaged], default=0))

    from know_cli.benchmark.devices import measure_device
    from know_cli.benchmark.kernels import measure_kernels
    from know_cli.benchmark.results import to_json
    from know_cli.benchmark.rivals import measure_averages
    from know_cli.benchmark.runs import measure_runs
    from know_cli.benchmark.scaling import measure_threads
    from know_cli.benchmark.stages import measure_stages
    from know_cli.benchmark.tables import sections, to_markdown
    from know_cli.engine.devices import choose_devices
    from know_cli.known.bundle import load_bundle
    from know_cli.known.shipped import DEFAULT_WEIGHTS, find_bundle

    (of_device, *_) = choose_devices(device)
    if device_rows is not None and of_device.type == "cpu":
        raise UsageError(
            f"--device-rows {device_rows}: is for a --device other than the CPU, which --rows "
            "measures; leave it out"
        )
    device_rows = device_rows or _DEVICE_ROWS
    workers = threads or usable_cores()
    bundle = load_bundle(find_bundle(weights or DEFAULT_WEIGHTS, _CHECKPOINTS))
    if bundle.checkpoints != _CHECKPOINTS:
        raise UsageError(
            f"--weights {weights}: reads {bundle.checkpoints} checkpoints; choose one for "
            f"{_CHECKPOINTS}"
        )
    talk.notice(f"kernel: {counted(rounds, 'round')} of {rows:,} parameters")
    kernels = measure_kernels(bundle, rows, rounds, workers)
    by_threads, stages = {}, {}
    if workers > 1:
        talk.notice(f"kernel with 1 and {workers} threads")
        by_threads = measure_threads(bundle, rows, rounds, workers)
        talk.notice(f"around the kernel with 1 and {workers} threads")
        with scratch_folder(place, "know-bench-") as temporary:
            stages = measure_stages(temporary, rows, rounds, workers)
    on_device = {}
    if of_device.type != "cpu":
        talk.notice(f"{of_device}: {counted(rounds, 'round')} of {device_rows:,} parameters")
        on_device = {str(of_device): measure_device(bundle, of_device, device_rows, rounds)}
    runs = []
    for size in wanted:
        talk.notice(f"predictions of {size:,} parameters")
        with scratch_folder(place, "know-bench-") as temporary:
            runs.append(
                measure_runs(
                    temporary, size, weights, _CHECKPOINTS, workers, max_memory,
                    min(rounds, _MOST_RUN_ROUNDS), device,
                )
            )  # fmt: skip
    means = []
    for size in averaged:
        talk.notice(f"means of folders of {size:,} parameters")
        with scratch_folder(place, "know-bench-") as temporary:
            try:
                means.append(
                    measure_averages(temporary, size, min(rounds, _MOST_RUN_ROUNDS), workers)
                )
            except CalledProcessError as error:
                raise OutputError(
                    f"{error.cmd[0]} failed with exit code {error.returncode}: "
                    f"{(error.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
                ) from error
    settings = {"checkpoints": _CHECKPOINTS, "rows": rows, "rounds": rounds, "threads": workers}
    if on_device:
        settings["device_rows"] = device_rows
    results = to_json(kernels, on_device, runs, settings, by_threads, stages, means)
    for section in sections(results):
        talk.show(*_shown(section))
    if json is not None:
        write_report(json, results, force=force)
    if table is not None:
        write_out(table, to_markdown(results), force=force)


def _parse_sizes(text: str, option: str) -> list[int]:
    """Numbers of parameters from ``1e5,2000000``, ascending; none from ``0``.

    Raises:
        UsageError: one is not a whole number from 1e3 to 1e11.
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
                f"{option} {text}: {part.strip()!r} is not a number of parameters from 1e3 to 1e11"
            )
        sizes.add(int(size))
    return sorted(sizes)


def _check_space(folder: Path, parameters: int) -> None:
    if not folder.is_dir():
        raise missing_folder(folder)
    needed, free = parameters * 4 * _FILES, free_bytes(folder)
    if needed > free:
        raise OutputError(
            f"{folder}: {parameters:,} parameters need {needed} bytes of disk, {free} are free; "
            "choose smaller --sizes or another --folder"
        )


def _shown(section: Section) -> Iterator[RenderableType]:
    """A section for a terminal."""
    from know_cli.cli.tables import new_table

    for line in (section.title, *section.notes):
        if line:
            yield line
            yield ""
    if section.rows:
        table = new_table(*section.header)
        for row in section.rows:
            table.add_row(*row)
        yield table
        yield ""
