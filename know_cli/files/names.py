"""Names of what is not complete yet, and of what is missing."""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
from pathlib import Path

from know_cli.errors import OutputError


def temporary_name() -> str:
    """A hidden name for what is not complete yet.

    It is not made of the final name, which may be as long as names can be.
    """
    return f".know-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that are given to what is not complete yet."""
    return name.startswith(".know-") and name.endswith(".tmp")


def own_name(name: str, suffix: str) -> str:
    """A hidden name that belongs to an output's name, the same each time.

    Args:
        name: of the output, without its folder.
        suffix: tells apart what belongs to one output, such as ``.tmp``.
    """
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".know-{digest}{suffix}"


def missing_folder(path: Path) -> OutputError:
    """The error for a folder that is to be written in and does not exist, with the remedy."""
    name = str(path)
    command = shlex.join(["mkdir", "-p", f"./{name}" if name.startswith("-") else name])
    return OutputError(f"{path}: no such folder; make it first: {command}")
