"""Small files, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from know_cli.errors import OutputError

# What systems answer where there is nothing to lock with (NFS answers EBADF for folders).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP}


def temporary_name() -> str:
    """A hidden name for what is not complete yet.

    It is not made of the final name, which may be as long as names can be.
    """
    return f".know-{secrets.token_hex(8)}.tmp"


def missing_folder(path: Path) -> OutputError:
    """The error for a folder that is to be written in and does not exist, with the remedy."""
    name = str(path)
    command = shlex.join(["mkdir", "-p", f"./{name}" if name.startswith("-") else name])
    return OutputError(f"{path}: no such folder; make it first: {command}")


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made, by making one.

    Raises:
        OutputError: with the system's reason.
    """
    probe = folder / temporary_name()
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written in: {error.strerror or error}; name another folder"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder with those above it, if it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be made: {error.strerror or error}") from error


def lock(descriptor: int, operation: int) -> bool:
    """Lock an open file or folder with ``flock``; the lock ends with the descriptor.

    Args:
        descriptor: of the file or folder.
        operation: such as ``fcntl.LOCK_EX | fcntl.LOCK_NB``.

    Returns:
        Whether the file system has locks; without, nobody is kept out.

    Raises:
        BlockingIOError: with ``LOCK_NB``, another process has locked it.
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, replacing a file that exists; what is no file is written into.

    Names of files that are no UTF-8, as Python decodes them, become the bytes that they were.

    Raises:
        OutputError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, replacing one that exists; what is no file is written into.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(temporary_name())
    try:
        if path.exists() and not path.is_file():  # a pipe or /dev/stdout
            path.write_bytes(data)
            return
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all bytes at a position of an open file.

    Raises:
        OSError: the system refuses.
    """
    if not data.nbytes:
        return  # an empty view cannot be cast
    view = data.cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, after something in it was created or renamed.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn the system's errors inside the block into one that names the output.

    Raises:
        OutputError: of what was an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written: {error.strerror or error}; nothing of it was kept"
        ) from error
