"""Folders: made, looked into by descriptor, emptied and removed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from know_cli.errors import OutputError
from know_cli.files.names import temporary_name

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_COPY_BYTES = 1 << 20


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


def new_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder that must not exist.

    Raises:
        OSError: it exists, or cannot be made.
    """
    path.mkdir(mode)


def temporary_place() -> Path:
    """Where the system has its temporary files."""
    return Path(tempfile.gettempdir())


@contextmanager
def scratch_folder(place: Path | None, prefix: str) -> Iterator[Path]:
    """A folder of a new name, only for this user, which is removed in the end.

    Args:
        place: where to make it; None is where the system has its temporary files.
        prefix: of its name.

    Raises:
        OSError: it cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as folder:
        yield Path(folder)


def remove_file(path: Path) -> None:
    """Remove a file or a link, if it is there.

    Raises:
        OSError: it is a folder, or cannot be removed.
    """
    path.unlink(missing_ok=True)


def remove_tree(path: Path, *, quietly: bool = False) -> None:
    """Remove a folder with all that is in it; links in it are removed and not followed.

    Args:
        path: of the folder; a link is refused.
        quietly: whether what cannot be removed stays without an error.

    Raises:
        OSError: something cannot be removed.
    """
    shutil.rmtree(path, ignore_errors=quietly)


def remove_empty(path: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        path.rmdir()


def free_bytes(folder: Path) -> int:
    """How much room there is for files in a folder.

    Raises:
        OSError: it cannot be looked at.
    """
    return shutil.disk_usage(folder).free


def remove_within(name: str, folder: int) -> None:
    """Remove a file or a link in an open folder.

    Raises:
        OSError: it cannot be removed.
    """
    os.unlink(name, dir_fd=folder)


def empty_folder(descriptor: int) -> None:
    """Remove all that is in an open folder.

    Raises:
        OSError: something cannot be removed.
    """
    for name in os.listdir(descriptor):
        found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            below = open_folder(name, descriptor)
            try:
                empty_folder(below)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=descriptor)
        else:
            remove_within(name, descriptor)


def open_folder(path: Path | str, within: int | None = None) -> int:
    """Open a folder; a link is refused.

    Args:
        path: of the folder.
        within: descriptor of the folder that it is relative to.

    Raises:
        OSError: it is no folder, or cannot be opened.
    """
    return os.open(path, _FOLDER, dir_fd=within)


@contextmanager
def folder_below(descriptor: int, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A folder within an open one, step by step and without following a link.

    Args:
        descriptor: of the folder to begin with.
        parts: names of folders, each in the one before.
        make: whether those that are missing are made.

    Raises:
        OSError: one is a link or no folder, or is missing.
    """
    here = os.dup(descriptor)
    try:
        for part in parts:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=here)
            below = open_folder(part, here)
            os.close(here)
            here = below
        yield here
    finally:
        os.close(here)


def create_file(name: str, within: int, mode: int = 0o666) -> int:
    """Make a file in an open folder, to be written only; it must be new.

    Returns:
        Its descriptor.

    Raises:
        OSError: the name is taken, or it cannot be made.
    """
    return os.open(name, _NEW, mode, dir_fd=within)


def open_to_write(name: str, within: int) -> int:
    """Open a file in an open folder, only to be written; a link is refused.

    Returns:
        Its descriptor.

    Raises:
        OSError: it is a link, missing, or cannot be opened.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=within)


def copy_file(source: int, name: str, within: int) -> None:
    """Copy an open file to a new one in an open folder, and flush it to disk.

    Raises:
        OSError: the copy cannot be written, or the source not be read.
    """
    target = create_file(name, within)
    try:
        position = 0
        while piece := os.pread(source, _COPY_BYTES, position):
            position += len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
        os.fsync(target)
    finally:
        os.close(target)
