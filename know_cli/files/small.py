"""Small files, written whole or not at all."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from know_cli.errors import OutputError
from know_cli.files.names import temporary_name
from know_cli.files.naming import give_name
from know_cli.files.places import destination, open_descriptor_of

# Of sync_file_range(2): begin to write, and wait for nothing.
_SYNC_FILE_RANGE_WRITE = 2

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_text(path: Path, text: str, *, replace: bool) -> None:
    """Write a text as UTF-8; see :func:`write_bytes`.

    Names of files that are no UTF-8, as Python decodes them, become the bytes that they were.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"), replace=replace)


def write_bytes(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file whole or not at all; into a pipe, a device or an open descriptor as it is.

    Args:
        path: of the file; links are resolved.
        data: all of it.
        replace: whether a file that exists is replaced.

    Raises:
        OutputError: it exists and must not be replaced, or it cannot be written.
    """
    try:
        descriptor = open_descriptor_of(path)
        if descriptor is not None:
            for stream in (sys.stdout, sys.stderr):  # what was printed before goes first
                with suppress(ValueError, AttributeError):
                    stream.flush()
            _write_all(descriptor, data)
            return
        place = destination(path)
        if place.exists() and not place.is_file():
            _write_into(place, data)
        else:
            _write_file(place, data, replace=replace)
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; --force replaces it") from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_file(place: Path, data: bytes, *, replace: bool) -> None:
    temporary = place.with_name(temporary_name())
    descriptor = os.open(temporary, _NEW, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
        give_name(descriptor, temporary, place, replace=replace)
        sync_folder(place.absolute().parent)
    finally:
        os.close(descriptor)
        with suppress(OSError):  # it has its name already, or the error that led here counts
            temporary.unlink()


def _write_into(place: Path, data: bytes) -> None:
    """Write into what is no file, such as a named pipe, without making or cutting anything."""
    descriptor = os.open(place, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{place}: has become a file in this moment; run again")
        _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """Make a file, which must be new, and open it as a binary stream without a buffer.

    Raises:
        OSError: it exists, or cannot be made.
    """
    with os.fdopen(os.open(path, _NEW, 0o666), "wb", 0) as file:
        yield file


def append(path: Path, data: memoryview) -> None:
    """Write at the end of a file; a link is refused.

    Raises:
        OSError: it is missing, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        _write_all(descriptor, data)
    finally:
        os.close(descriptor)


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


def start_flushing(descriptor: int) -> None:
    """Have the system write what it holds of a file to disk, where it can be told so, unwaited for.

    It would begin on its own only when much more is there, and flushing would then wait for all.
    """
    function = _sync_file_range()
    if function is not None:
        function(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    """The C library's function of that name; None where it has none."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def reserve(descriptor: int, size: int) -> None:
    """Make an empty open file so many bytes long, all of them reserved on disk where that can be.

    A full disk then fails before hours of work, not after. The file must be empty: where a file
    system cannot do it, the C library reads what is there.

    Raises:
        OSError: there is no space.
    """
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


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
