"""Giving a name to what was written, and to nothing else: by descriptor and inode."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from know_cli.errors import OutputError

_NO_REPLACE = 1  # of renameat2(2); of renamex_np(2) it is 4
_AT_FDCWD = -100
# What systems answer that have no such call, or have it not on this file system.
_LACKING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
# What a link by descriptor can fail with, that a renaming would fail with as well.
_FINAL = {errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


def is_same(path: Path, found: os.stat_result) -> bool:
    """Whether a name, links not followed, is that of a file or folder that was looked at."""
    try:
        here = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (here.st_dev, here.st_ino) == (found.st_dev, found.st_ino)


def give_name(descriptor: int, temporary: Path, name: Path, *, replace: bool) -> None:
    """Give an open file or folder its name, in the folder in which it has a temporary one.

    Args:
        descriptor: of what was written, and flushed.
        temporary: its name until now.
        name: no link.
        replace: whether a regular file of that name is replaced. A folder never replaces anything.

    Raises:
        FileExistsError: the name is taken, and must not be replaced.
        OutputError: what was written has no name any more, or the name is a special file's.
        OSError: the system refuses.
    """
    found = os.fstat(descriptor)
    if not is_same(temporary, found):
        raise OutputError(
            f"{name}: what was written was removed or replaced under its temporary name "
            f"({temporary.name}), by a cleaner or another program; run again"
        )
    if stat.S_ISDIR(found.st_mode):
        rename_new(temporary, name)
    elif replace:
        _replace(descriptor, temporary, name)
    else:
        _link(descriptor, temporary, name)
    _check(name, found)


def _check(name: Path, written: os.stat_result) -> None:
    """Refuse to call a name the output's that another user has put there."""
    if is_same(name, written):
        return
    with suppress(FileNotFoundError):
        here = name.lstat()
        # Another run of this user may just have replaced it, whole.
        kinds = {stat.S_IFMT(found.st_mode) for found in (here, written)}
        if here.st_uid == written.st_uid and len(kinds) == 1:
            return
    raise OutputError(
        f"{name}: another program put something else there in the moment it was written; write "
        "into a folder that others cannot write to"
    )


def second_name(temporary: Path) -> Path:
    """What a file is called for a moment before it replaces another; it is whole by then.

    Args:
        temporary: its name until then. Runs without a lock each have one of their own.
    """
    return temporary.with_name(f"{temporary.name.removesuffix('.tmp')}.new.tmp")


def _replace(descriptor: int, temporary: Path, name: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(name.lstat().st_mode):
            raise OutputError(f"{name}: is not a file any more, and is not replaced")
    second = second_name(temporary)
    try:
        with suppress(FileNotFoundError):
            second.unlink()  # of a run that was killed in here
        try:
            link_descriptor(descriptor, second)
        except OSError as error:
            if error.errno in _FINAL:
                raise
            os.replace(temporary, name)  # noqa: PTH105  tests count the calls of os
            return
        os.replace(second, name)  # noqa: PTH105
        # Not before: as soon as the temporary name is free, the next run locks one of its own, and
        # removes a second name as one that a killed run left.
        with suppress(OSError):  # the output is complete; the next run takes it away
            temporary.unlink(missing_ok=True)
    except BaseException:  # also an interruption just after the link was made
        if is_same(second, os.fstat(descriptor)):
            second.unlink(missing_ok=True)
        raise


def _link(descriptor: int, temporary: Path, name: Path) -> None:
    try:
        link_descriptor(descriptor, name)
    except OSError as error:
        if error.errno in _FINAL:
            raise
        rename_new(temporary, name)
    else:
        with suppress(OSError):  # the output is complete; the next run takes it away
            temporary.unlink(missing_ok=True)


def link_descriptor(descriptor: int, name: Path) -> None:
    """Give the inode of an open file another name, which must be new.

    Raises:
        FileExistsError: it is taken.
        OSError: this system or file system cannot do it.
    """
    # Only with a descriptor of a folder does Python ask for the link to be followed.
    folder = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(
            f"/proc/self/fd/{descriptor}",
            name.name,
            src_dir_fd=folder,
            dst_dir_fd=folder,
            follow_symlinks=True,
        )
    finally:
        os.close(folder)


def rename_new(
    source: Path | str, name: Path | str, *, from_folder: int | None = None, to: int | None = None
) -> None:
    """Rename a file or folder to a name that must be new.

    Args:
        source: what there is.
        name: where it goes, on the same file system.
        from_folder: descriptor of the folder that ``source`` is relative to.
        to: descriptor of the folder that ``name`` is relative to.

    Raises:
        FileExistsError: the name is taken.
        OSError: the system refuses.
    """
    code = _renameat2(source, name, from_folder, to)
    if code == 0:
        return
    if code not in _LACKING:
        kind = FileExistsError if code == errno.EEXIST else OSError
        raise kind(code, os.strerror(code), os.fspath(source), None, os.fspath(name))
    # Where there is no such call, the name is taken by something empty, which is then replaced.
    is_folder = stat.S_ISDIR(os.stat(source, dir_fd=from_folder, follow_symlinks=False).st_mode)
    if is_folder:
        os.mkdir(name, dir_fd=to)
    else:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o600, dir_fd=to))
    try:
        os.rename(source, name, src_dir_fd=from_folder, dst_dir_fd=to)
    except BaseException:
        with suppress(OSError):
            (os.rmdir if is_folder else os.unlink)(name, dir_fd=to)
        raise


def _renameat2(
    source: Path | str, name: Path | str, from_folder: int | None, to: int | None
) -> int:
    """Linux' own call; 0, or the number of the error."""
    if not sys.platform.startswith("linux"):
        return errno.ENOSYS
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library from before 2018
        return errno.ENOSYS
    at, there = (_AT_FDCWD if folder is None else folder for folder in (from_folder, to))
    if call(at, os.fsencode(source), there, os.fsencode(name), _NO_REPLACE) == 0:
        return 0
    return ctypes.get_errno()
