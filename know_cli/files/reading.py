"""What is read is a regular file: no pipe hangs a run, and no device is asked for anything."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_NOT_A_FILE = "not a regular file, such as a pipe, a device or a folder"
_TOO_LONG = "longer than the {} bytes that are read"
_PIECE = 1 << 20
#: The most that is read of a text for which the caller names no bound.
MOST_BYTES = 256 << 20


def check_regular(path: Path) -> None:
    """Refuse what is no regular file, links followed; opening a device can have effects.

    Raises:
        OSError: it is none, or cannot be looked at.
    """
    _check(path, path.stat())


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, _NOT_A_FILE, str(path))


def open_to_read(path: Path) -> int:
    """Open a regular file for reading, links followed.

    Returns:
        Its descriptor.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    check_regular(path)
    descriptor = os.open(path, _FLAGS)
    try:
        _check(path, os.fstat(descriptor))  # it may have been swapped in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def open_file(path: Path, buffering: int = -1) -> Iterator[Any]:
    """Open a regular file as a binary stream; see :func:`open_to_read`."""
    with os.fdopen(open_to_read(path), "rb", buffering) as file:
        yield file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a whole regular file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: it is no regular file, too long, or cannot be read.
    """
    with open_file(path) as file:
        pieces, left = [], most + 1
        while left and (piece := file.read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        raise OSError(errno.EFBIG, _TOO_LONG.format(most), str(path))
    return b"".join(pieces)


def read_text(path: Path, most: int = MOST_BYTES, *, errors: str = "strict") -> str:
    """Read a whole regular file as UTF-8; line ends become a line feed.

    Args:
        path: of the file.
        most: bytes that it may have.
        errors: what becomes of bytes that are no UTF-8, as for :meth:`bytes.decode`.

    Raises:
        OSError: as :func:`read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    text = read_bytes(path, most).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")
