"""Moves files from one open folder into another, without following a link in either."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from know_cli.errors import OutputError
from know_cli.files.folders import folder_below, open_folder
from know_cli.files.naming import rename_new

_PIECE = 1 << 20


def files_below(descriptor: int) -> Iterator[Path]:
    """All that is no folder below an open folder, by paths relative to it, sorted in each folder.

    Raises:
        OSError: a folder cannot be listed.
    """
    for name in sorted(os.listdir(descriptor)):
        found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            below = open_folder(name, descriptor)
            try:
                yield from (Path(name) / path for path in files_below(below))
            finally:
                os.close(below)
        else:
            yield Path(name)


def move(source: int, target: int, relative: Path, *, replace: bool) -> None:
    """Move a file to the same path in another open folder.

    Args:
        source: descriptor of the folder that it is below.
        target: descriptor of the other, on the same file system.
        relative: its path.
        replace: whether a file or link of that name in the other is replaced.

    Raises:
        FileExistsError: the name is taken, and must not be replaced.
        OutputError: there is neither a file nor a link in the place.
        OSError: the system refuses, or a folder on the way is a link.
    """
    parents, name = relative.parent.parts, relative.name
    with (
        folder_below(source, parents) as from_folder,
        folder_below(target, parents, make=True) as to,
    ):
        if not replace:
            rename_new(name, name, from_folder=from_folder, to=to)
            return
        with suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=to, follow_symlinks=False)
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
                raise OutputError(
                    f"{relative}: is neither a file nor a link in the output, and is not replaced"
                )
        os.replace(name, name, src_dir_fd=from_folder, dst_dir_fd=to)


def have_same_content(source: int, target: int, relative: Path) -> bool:
    """Whether two open folders have the same bytes in a file of one path."""
    opened: list[int] = []
    try:
        for folder in (source, target):
            with folder_below(folder, relative.parent.parts) as within:
                opened.append(_open(relative.name, within))
        if not all(stat.S_ISREG(os.fstat(one).st_mode) for one in opened):
            return False
        if len({os.fstat(one).st_size for one in opened}) > 1:
            return False
        position = 0
        while True:
            one, other = (os.pread(descriptor, _PIECE, position) for descriptor in opened)
            if one != other:
                return False
            if not one:
                return True
            position += len(one)
    except OSError:
        return False
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _open(name: str, within: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=within)
