"""What a data set must provide to be registered, and the error for missing files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.errors import UsageError
from know_cli.lab.data.samples import DataSet

Folders = Sequence[Path]


@dataclass(frozen=True)
class Source:
    """How one data set is found and read.

    Attributes:
        read: reads the data set from the first of the given folders that has it; raises
            UsageError if files or packages are missing or a file is corrupt.
        find: whether ``read`` would find what it needs, without reading all of it. Corrupt
            contents may go unnoticed.
    """

    read: Callable[[Folders], DataSet]
    find: Callable[[Folders], bool]


def missing(name: str, folders: Folders, remedy: str) -> UsageError:
    """The error for a data set whose files are missing.

    Args:
        name: of the data set.
        folders: where they were searched for.
        remedy: what the user can do, starting with a verb.
    """
    places = ", ".join(str(folder) for folder in folders)
    return UsageError(f"data set {name!r}: nothing in {places}; {remedy}")
