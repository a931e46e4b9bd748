"""JSON reports on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from know_cli.errors import OutputError


def check_report_path(path: Path, others: Sequence[Path]) -> None:
    """Refuse a report that has no folder, or would overwrite an input or the output.

    Raises:
        OutputError: the reason, and what to do.
    """
    try:
        path.exists()
    except OSError as error:  # a name too long, for one
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file for the report")
    resolved = path.resolve()
    for other in others:
        if resolved == other.resolve() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise OutputError(f"--report {path}: is a checkpoint of this run; name another file")


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write a report as JSON, replacing one that exists.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, replacing a file that exists.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
