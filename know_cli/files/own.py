"""Files that belong to this program alone, such as journals and logs, opened to go on with them."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from know_cli.errors import OutputError
from know_cli.files.naming import is_same
from know_cli.files.small import write_at

_PIECE = 1 << 20
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True)
class OwnFile:
    """An open file of this program.

    Attributes:
        path: its name.
        descriptor: through which all is read and written, whatever becomes of the name.
    """

    path: Path
    descriptor: int

    def has_name(self) -> bool:
        """Whether its name still is its own."""
        return is_same(self.path, os.fstat(self.descriptor))

    def remove(self) -> None:
        """Remove its name, unless that has become another file's.

        Raises:
            OSError: the system refuses.
        """
        if self.has_name():
            self.path.unlink(missing_ok=True)

    def truncate(self, size: int) -> None:
        """Make it so many bytes long."""
        os.ftruncate(self.descriptor, size)

    def read(self) -> bytes:
        """All that is in it."""
        pieces, position = [], 0
        while piece := os.pread(self.descriptor, _PIECE, position):
            pieces.append(piece)
            position += len(piece)
        return b"".join(pieces)

    def replace_content(self, data: bytes) -> None:
        """Make it what it is to be, and flush it to disk."""
        before = self.read()
        if not before.startswith(data):
            write_at(self.descriptor, memoryview(data), 0)
        self.truncate(len(data))
        os.fsync(self.descriptor)

    def append(self, data: bytes) -> None:
        """Write at its end, and flush it to disk."""
        write_at(self.descriptor, memoryview(data), os.fstat(self.descriptor).st_size)
        os.fsync(self.descriptor)

    def write(self, data: memoryview, position: int) -> int:
        """Write some bytes; how many were written."""
        return os.pwrite(self.descriptor, data, position)

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)


def open_own(path: Path, what: str, *, create: bool = True, mode: int = 0o600) -> OwnFile:
    """Open a file of this program for reading and writing; no link is followed.

    Args:
        path: of the file.
        what: it is, for the message, such as ``journal``.
        create: whether it is made if it is missing.
        mode: of one that is made.

    Raises:
        OutputError: there is something else: a link, a pipe, another user's file, or one that has
            other names, through which somebody else's file would be written.
        OSError: it cannot be opened.
    """
    problem = OutputError(
        f"{path}: is not a {what} of this program and user, but is where one must go; remove it, "
        "or name another place"
    )
    if create:
        with suppress(FileExistsError):
            return OwnFile(path, os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode))
    if not _is_own(path.lstat()):
        raise problem
    descriptor = os.open(path, _FLAGS)
    if not _is_own(os.fstat(descriptor)):
        os.close(descriptor)
        raise problem
    return OwnFile(path, descriptor)


def _is_own(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink <= 1
