"""What a data set has to bring to be registered, and the words for files that are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.errors import UsageError
from know_cli.lab.data.samples import DataSet

Folders = Sequence[Path]


@dataclass(frozen=True)
class Source:
    """One data set's way into the program.

    Attributes:
        read: maps the folders to look in, the first one first, to the data set; raises
            UsageError where files or packages are missing or files are corrupt.
        find: whether ``read`` has what it needs, without reading all of it. Corrupt contents
            may go unnoticed.
    """

    read: Callable[[Folders], DataSet]
    find: Callable[[Folders], bool]


def missing(name: str, folders: Folders, remedy: str) -> UsageError:
    """The error for a data set without its files.

    Args:
        name: of the data set.
        folders: where they were looked for.
        remedy: what to do, from the verb on.
    """
    places = ", ".join(str(folder) for folder in folders)
    return UsageError(f"data set {name!r}: nothing in {places}; {remedy}")
