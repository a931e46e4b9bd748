"""Reports, on disk or on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from know_cli.errors import OutputError, UsageError
from know_cli.files import (
    destination,
    json_text,
    missing_folder,
    open_descriptor_of,
    read_text,
    write_text,
)
from know_cli.files.protected import Protected, is_special, is_within

_STDOUT = Path("-")
_MOST_BYTES = 1 << 28


def takes_stdout(*paths: Path | None) -> bool:
    """Whether one of these is to go to standard output, as ``-`` and ``/dev/stdout`` say.

    Raises:
        UsageError: more than one is.
        OutputError: one is an open file of another process.
    """
    count = sum(path is not None and _is_stdout(path) for path in paths)
    if count > 1:
        raise UsageError("-: standard output takes one report; name a file for the other")
    return count == 1


def _is_stdout(path: Path) -> bool:
    return path == _STDOUT or open_descriptor_of(path) == 1


def check_report_path(
    path: Path, others: Sequence[Path], option: str = "--json", *, force: bool = False
) -> None:
    """Refuse a report that cannot be written, or would overwrite an input or an output.

    Args:
        path: of the report; a pipe, a device or an open descriptor is written into.
        others: files and folders of this run; nothing in these folders may be written either.
        option: that the report was given with, for the message.
        force: whether a file that exists may be replaced.

    Raises:
        OutputError: the reason, and what to do.
    """
    if takes_stdout(path) or open_descriptor_of(path) is not None:
        return
    try:
        place = destination(path)
        path.exists()
    except OSError as error:  # a name too long, for one
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    if is_special(place):
        return
    if not place.parent.is_dir():
        raise missing_folder(place.parent)
    if place.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in {place.parent}")
    if any(is_within(place, other) for other in others):
        raise OutputError(
            f"{option} {path}: is an input or an output of this run; name another file"
        )
    folders = [other for other in others if other.is_dir()]
    Protected([other for other in others if other not in folders], folders).refuse(
        path, [path, place], option=option
    )
    if os.path.lexists(path) and not force:
        raise OutputError(f"{option} {path}: exists already; --force replaces it")


def check_reports(
    json: Path | None, table: Path | None, others: Sequence[Path], *, force: bool = False
) -> None:
    """Refuse ``--json`` and ``--table`` as :func:`check_report_path` does, also both in one file.

    Raises:
        OutputError: the reason, and what to do.
    """
    taken = list(others)
    for option, path in (("--json", json), ("--table", table)):
        if path is not None:
            check_report_path(path, taken, option, force=force)
            taken.append(path)


def write_report(path: Path, content: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a report as JSON to a file, or to standard output for ``-``.

    Args:
        path: of the file.
        content: plain types; numbers that JSON does not have become null.
        force: whether a file that exists is replaced.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    write_out(path, json_text(content, indent=2), force=force)


def write_out(path: Path, text: str, *, force: bool = False) -> None:
    """Write a text to a file, or to standard output for ``-``; see :func:`write_report`.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    if takes_stdout(path):
        sys.stdout.write(text)
    else:
        write_text(path, text, replace=force)


def is_own_result(path: Path) -> bool:
    """Whether a file of results that this program keeps in a folder is there already.

    Raises:
        OutputError: there is something else by that name.
    """
    if not os.path.lexists(path):
        return False
    try:
        content = json.loads(read_text(path, _MOST_BYTES))
        found = isinstance(content, dict) and "format" in content and not path.is_symlink()
    except (OSError, ValueError, RecursionError):
        found = False
    if not found:
        raise OutputError(
            f"{path}: is where the results go, but is none of this program; name another folder"
        )
    return True
