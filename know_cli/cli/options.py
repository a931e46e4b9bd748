"""Options that several commands share, and parsers, whose errors quote what the user wrote."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import typer

from know_cli.errors import UsageError

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?$", re.IGNORECASE)
_SMALLEST_RATE = 0.01
_LARGEST_SIZE = 2**60
_MOST_THREADS = 1024


def parse_named(texts: list[str], option: str, value: str) -> dict[str, str]:
    """Parse a repeatable option ``NAME=VALUE``: the values by name.

    Raises:
        UsageError: one is not of that form, a name is given twice, or neither a file nor a column
            of a table can have it.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, sign, rest = text.partition("=")
        if not (name and sign and rest):
            raise UsageError(f"{option} {text}: write NAME={value}")
        if not name.isprintable() or set(name) & {"/", "|"}:
            raise UsageError(f"{option} {text}: a name has no / or |; give it another")
        if name in found:
            raise UsageError(f"{option} {text}: {name} is given twice")
        found[name] = rest
    return found


def report_option() -> Any:
    """``--report``, the older name of ``--json``: accepted, but not listed by ``--help``."""
    return typer.Option("--report", hidden=True)


def one_json(json: Path | None, report: Path | None) -> Path | None:
    """The file that ``--json``, or its older name ``--report``, was given.

    Raises:
        UsageError: both were.
    """
    if json is not None and report is not None:
        raise UsageError("--report is the older name of --json; write --json alone")
    return json if report is None else report


def force_option() -> Any:
    """``--force`` of commands that only write reports."""
    return typer.Option("--force", help="Replace a report that exists.")


def data_folder_option() -> Any:
    """``--data-folder`` of commands that train on data sets."""
    return typer.Option(metavar="FOLDER", help="Where the data sets' files are, FOLDER/NAME each.")


def picture_option() -> Any:
    """``--output`` of commands that draw."""
    return typer.Option(
        "-o", "--output", metavar="FILE.png|.svg", show_default=False, help="The picture."
    )


def force_picture_option() -> Any:
    """``--force`` of commands that draw."""
    return typer.Option("--force", help="Replace an existing picture.")


def drawn_json_option() -> Any:
    """``--json`` of commands that draw."""
    return typer.Option(
        metavar="FILE.json",
        show_default=False,
        help="Write what is drawn as JSON; - is standard output.",
    )


def grid_option() -> Any:
    """``--grid`` of landscapes."""
    return typer.Option(metavar="N", min=3, max=201, help="Points along each axis.")


def margin_option() -> Any:
    """``--margin`` of landscapes."""
    return typer.Option(
        min=0.0, max=10.0, help="Margin around the checkpoints, as a share of their extent."
    )


def trajectory_option(panel: str | None = None) -> Any:
    """``--trajectory``; see :func:`quiet_option`."""
    return typer.Option(
        "--trajectory",
        show_default="what the checkpoints tell, else forgetting",
        help="How the checkpoints came about. forgetting: full data first; run: one ordinary "
        "training, put in order by its training steps; branches: several trainings that go on "
        "from one model, which is given first.",
        rich_help_panel=panel,
    )


def last_option(panel: str | None = None) -> Any:
    """``--last``; see :func:`quiet_option`."""
    return typer.Option(
        metavar="N",
        min=2,
        show_default="all",
        help="Of a run, take its last N checkpoints.",
        rich_help_panel=panel,
    )


def every_option(panel: str | None = None) -> Any:
    """``--every``; see :func:`quiet_option`."""
    return typer.Option(
        metavar="N",
        min=1,
        show_default="all",
        help="Of a run, take every Nth checkpoint, counted back from the latest, and --last of "
        "these.",
        rich_help_panel=panel,
    )


def quiet_option(panel: str | None = None) -> Any:
    """``--quiet`` of every command; ``panel`` is its heading in ``--help``."""
    return typer.Option("-q", "--quiet", help="Print errors only.", rich_help_panel=panel)


def no_progress_option(panel: str | None = None) -> Any:
    """``--no-progress``; see :func:`quiet_option`."""
    return typer.Option(
        "--no-progress",
        help="Plain lines instead of a progress bar; the default where stderr is not a terminal.",
        rich_help_panel=panel,
    )


def threads_option(panel: str | None = None, more: str = "") -> Any:
    """``--threads`` of the engine; ``more`` is added to its help; see :func:`quiet_option`."""
    return typer.Option(
        metavar="N",
        min=1,
        max=_MOST_THREADS,
        show_default="one per usable core",
        help=f"Worker threads on the CPU{more}.",
        rich_help_panel=panel,
    )


def torch_threads_option(default: str = "torch's own") -> Any:
    """``--threads`` of commands that train in this process; ``default`` says what it is without."""
    return typer.Option(min=1, max=_MOST_THREADS, help="Threads of torch.", show_default=default)


def max_memory_option(panel: str | None = None, more: str = "") -> Any:
    """``--max-memory`` of the engine; see :func:`threads_option`."""
    return typer.Option(
        metavar="SIZE",
        parser=parse_size,
        show_default="1GiB",
        help=f"Bound on the working memory{more}, such as 512M or 4GiB.",
        rich_help_panel=panel,
    )


def parse_size(text: str | int) -> int:
    """Bytes from ``512M``, ``1G``, ``1.5GiB`` or a plain number; powers of 1024.

    Raises:
        typer.BadParameter: anything else.
    """
    # Defaults go through an option's parser, too.
    match = _SIZE.match(str(text).strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write 512M, 1G, 1.5GiB or bytes")
    power = " kmgt".index(match[2].lower() or " ")
    size = float(match[1]) * 1024**power
    if size >= _LARGEST_SIZE:
        raise typer.BadParameter(f"{text!r} is more than any machine has")
    return int(size)


def parse_rate(text: str) -> float:
    """A sampling rate from ``0.5`` or ``1/3``.

    Raises:
        typer.BadParameter: not a number between 0.01 and 1.
    """
    try:
        rate = float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a rate; write 0.5 or 1/3") from None
    if not _SMALLEST_RATE <= rate < 1:
        raise typer.BadParameter(f"{text!r}: a rate is at least {_SMALLEST_RATE} and below 1")
    return rate


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``2/3``, the second of three shards, as (1, 3): its index and their number.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text}: write I/N, such as 1/2 on one machine, 2/2 on another")
    return number - 1, count


def usual_processes(device: str) -> int:
    """Trials at the same time, where nobody says how many: one a core, or one a card.

    Args:
        device: as ``--device`` has it.

    Raises:
        UsageError: there is no such device.
    """
    from know_cli.engine.devices import choose_devices

    first, *others = choose_devices(device)
    return usable_cores() if first.type == "cpu" else 1 + len(others)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
