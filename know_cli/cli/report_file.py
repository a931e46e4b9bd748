"""JSON reports, on disk or on standard output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from know_cli.errors import OutputError, UsageError
from know_cli.files import missing_folder, write_text

_STDOUT = Path("-")


def takes_stdout(*paths: Path | None) -> bool:
    """Whether one of these is to go to standard output, as ``-`` says.

    Raises:
        UsageError: more than one is.
    """
    count = paths.count(_STDOUT)
    if count > 1:
        raise UsageError("-: standard output takes one report; name a file for the other")
    return count == 1


def check_report_path(path: Path, others: Sequence[Path], option: str = "--json") -> None:
    """Refuse a report that cannot be written, or would overwrite an input or an output.

    Args:
        path: of the report.
        others: files and folders of this run; nothing in these folders may be written either.
        option: that the report was given with, for the message.

    Raises:
        OutputError: the reason, and what to do.
    """
    if takes_stdout(path):
        return
    try:
        path.exists()
    except OSError as error:  # a name too long, for one
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    if not path.parent.is_dir():
        raise missing_folder(path.parent)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write in {path.parent}")
    resolved = path.resolve()
    for other in others:
        within = resolved.is_relative_to(other.resolve())
        if within or (path.exists() and other.exists() and path.samefile(other)):
            raise OutputError(
                f"{option} {path}: is an input or an output of this run; name another file"
            )


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write a report as JSON, replacing one that exists, or to standard output.

    Raises:
        OutputError: it cannot be written.
    """
    # Escaped, since a path may have bytes that are no UTF-8.
    write_out(path, json.dumps(content, indent=2) + "\n")


def write_out(path: Path, text: str) -> None:
    """Write a text to a file, replacing one that exists, or to standard output for ``-``.

    Raises:
        OutputError: it cannot be written.
    """
    if takes_stdout(path):
        sys.stdout.write(text)
    else:
        write_text(path, text)
