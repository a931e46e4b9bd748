"""Where an output is until it is complete: beside its place, locked, one a name.

The name is made from the output's, so that a run that was killed leaves at most one file, and
the next run to the same output finds and empties it. The lock (``flock``) is the operating system's
and ends with its process: what is not locked is stale, whoever left it. Where a file system has
no locks, each run has a temporary of its own, and the last one to finish wins whole.

All is written through the descriptor that was locked, and what it belongs to is what gets the
output's name, whatever others do to the temporary name meanwhile. A folder is closed to other
users until then.

Ranks that write one output together hold one lock together: only when the last of them has ended
is it stale, so that no straggler of a killed run writes into the next run's temporary.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from know_cli.errors import OutputError
from know_cli.files.folders import create_file, empty_folder, remove_tree
from know_cli.files.locks import lock
from know_cli.files.names import own_name, temporary_name
from know_cli.files.naming import give_name, is_same, rename_new, second_name
from know_cli.files.places import destination

_ATTEMPTS = 100
# Another machine may remember for a while that there was no such file (NFS does by default for
# up to half a minute).
_SEEN_WITHIN_SECONDS = 60.0
_LOOK_EVERY_SECONDS = 0.1
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_KEPT = 1000


class NameTakenError(OutputError):
    """A name was taken during the run; the result is kept beside it, as the message says."""


class Temporary:
    """A file or folder that this process alone writes.

    Attributes:
        path: where it is; empty at first.
        place: the output's own place, links resolved.
        descriptor: of the file or folder.
    """

    def __init__(self, output: Path, *, is_folder: bool) -> None:
        """Make and lock it.

        Args:
            output: what it is going to be.
            is_folder: what to make.

        Raises:
            OutputError: another run is writing the same output, or something that is not ours
                is in the place.
            OSError: it cannot be made.
        """
        self._output = output
        self._is_folder = is_folder
        self.place = destination(output)
        is_there = self.place.is_dir()
        # A folder that exists may be a file system of its own, into which nothing can be renamed.
        self._folder = self.place if is_there else self.place.absolute().parent
        name = self.place.resolve().name if is_there else self.place.name
        self.path = self._folder / own_name(name, ".tmp")
        self.descriptor = -1
        self._has_lock = False
        self._moved = False
        self._is_ours = False
        self._is_made = False
        self._mode: int | None = None
        try:
            self._acquire()
            if is_folder:
                self._close_to_others()
        except BaseException:  # an interruption may come at any moment
            if self._is_ours:
                self.discard()
            elif self._is_made:
                self._remove_made()
            raise

    def _remove_made(self) -> None:
        """Remove what was made when an interruption came, unless it is another run's by now."""
        kind = os.O_DIRECTORY if self._is_folder else os.O_RDWR
        with suppress(OSError, OutputError):
            descriptor = os.open(self.path, kind | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                self._refuse_strange(os.fstat(descriptor))
                # Who has the lock, or has written something, goes on with it.
                if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    return
                found = os.fstat(descriptor)
                if self._is_folder:
                    self.path.rmdir()
                elif found.st_size == 0 and is_same(self.path, found):
                    self.path.unlink()
            finally:
                os.close(descriptor)

    def _acquire(self) -> None:
        missing: FileNotFoundError | None = None
        for _ in range(_ATTEMPTS):
            self._is_ours = False
            try:
                descriptor = self._open()
                missing = None
            except FileExistsError:
                continue  # another run made it in this moment
            except FileNotFoundError as error:
                missing = error  # another run removed it, or there is no making any here
                continue
            try:
                if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    self._go_without_lock()
                    return
                if is_same(self.path, os.fstat(descriptor)):
                    self._is_ours = True
                    if not self._is_folder and os.fstat(descriptor).st_nlink > 1:
                        # Killed after the file had got its name: what it was is complete.
                        self.path.unlink(missing_ok=True)
                        continue
                    self._empty(descriptor)
                    self._remove_second()
                    self.descriptor, descriptor = descriptor, -1
                    self._has_lock = True
                    return
            except BlockingIOError:
                self._is_ours = False
                break
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        raise missing or _another_run(self._output)

    def _open(self) -> int:
        """The file or folder, made if it is missing; links are not followed."""
        kind = os.O_DIRECTORY if self._is_folder else os.O_RDWR
        # A signal that comes while the system makes it is told before a name can be bound.
        self._is_made = True
        try:
            if self._is_folder:
                self.path.mkdir()
                self._is_ours = True
            else:
                made = os.open(self.path, _NEW_FILE, 0o666)
                self._is_ours = True
                return made
        except FileExistsError:
            self._is_made = False
            # In a folder that all may write to, a stranger could have put it there.
            self._refuse_strange(self.path.lstat())
        descriptor = os.open(self.path, kind | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._refuse_strange(os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _refuse_strange(self, found: os.stat_result) -> None:
        ours = stat.S_ISDIR(found.st_mode) if self._is_folder else stat.S_ISREG(found.st_mode)
        if not ours or found.st_uid != os.geteuid():
            raise OutputError(
                f"{self.path}: is not a temporary of this program and user, but is where one "
                "must go; remove it, or name another output"
            )

    def _close_to_others(self) -> None:
        """Keep other users out, who could put links into a folder that its group may write."""
        mode = stat.S_IMODE(os.fstat(self.descriptor).st_mode)
        with suppress(PermissionError):  # file systems without rights
            os.fchmod(self.descriptor, mode & ~0o077)
            self._mode = mode
            empty_folder(self.descriptor)  # of what came in between

    def _empty(self, descriptor: int) -> None:
        """Take away what a run that was killed left."""
        if self._is_folder:
            empty_folder(descriptor)
        else:
            os.ftruncate(descriptor, 0)

    def _remove_second(self) -> None:
        if not self._is_folder:
            second = second_name(self.path)
            with suppress(FileNotFoundError):
                found = second.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    second.unlink()

    def _go_without_lock(self) -> None:
        if self._is_ours:
            self._remove()
        self.path = self._folder / temporary_name()
        if self._is_folder:
            self.path.mkdir()
            self._is_ours = True
            kind = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.path, kind)
        else:
            self.descriptor = os.open(self.path, _NEW_FILE, 0o666)
            self._is_ours = True

    def start_file(self, name: str) -> int:
        """Open the file itself, or a new one in the folder, only to be written.

        Args:
            name: of the file in the folder.

        Returns:
            A descriptor that is the caller's to close.

        Raises:
            OSError: it cannot be opened.
        """
        if self._is_folder:
            return create_file(name, self.descriptor)
        return reopen_to_write(self.descriptor, self.path)

    def share(self) -> bool:
        """Hold the lock together with those that :func:`join_temporary`.

        Returns:
            Whether there is a lock.

        Raises:
            OutputError: another run has taken it in this moment.
        """
        if not self._has_lock:
            return False
        try:
            # Not atomic: the system gives up the one lock before it tries to get the other.
            lock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._moved = True  # it is theirs now
            raise _another_run(self._output) from None
        if not is_same(self.path, os.fstat(self.descriptor)):
            self._moved = True
            raise _another_run(self._output)
        return True

    def give_name(self, *, replace: bool) -> None:
        """Give it the output's name.

        Args:
            replace: whether a file that exists is replaced; a folder never replaces anything.

        Raises:
            NameTakenError: the name is taken.
            OutputError: what was written was removed by others.
            OSError: the system refuses.
        """
        self._open_to_others()
        try:
            give_name(self.descriptor, self.path, self.place, replace=replace)
        except FileExistsError:
            self.keep()
        self._moved = True

    def _open_to_others(self) -> None:
        if self._mode is not None:
            os.fchmod(self.descriptor, self._mode)

    def keep(self) -> None:
        """Keep the result beside a name that somebody else has taken during the run.

        Raises:
            NameTakenError: always, with where the result is.
        """
        self._open_to_others()
        suffix = "" if self._is_folder else self.place.suffix
        stem = self.place.name.removesuffix(suffix) if suffix else self.place.name
        folder = self.place.absolute().parent
        names = [folder / f"{stem}.kept{number}{suffix}" for number in range(1, _MOST_KEPT)]
        beside = self.path
        # The first name may be too long, or on another file system.
        for wanted in (*names, self.path.with_name(f"kept-{temporary_name()[1:]}")):
            with suppress(OSError):
                rename_new(self.path, wanted)
                beside = wanted
                break
        self._moved = True
        raise NameTakenError(
            f"{self._output}: has come to be there during the run, and is not replaced; the result "
            f"is kept beside it: {beside}"
        )

    def moved(self) -> None:
        """Note that it has the output's name now; its old name may be another run's."""
        self._moved = True

    def _remove(self) -> None:
        if self._is_folder:
            remove_tree(self.path, quietly=True)
        else:
            self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove it, unless it was moved or is another's, and let go of the lock.

        What cannot be removed stays, for the next run: what led here counts more, an error or a
        complete output.
        """
        if not self._moved:
            with suppress(OSError):
                if self.descriptor < 0 or is_same(self.path, os.fstat(self.descriptor)):
                    self._remove()
            self._moved = True
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def reopen_to_write(descriptor: int, path: Path) -> int:
    """Open an open file once more, such that it can be written and not read.

    Several machines may write to one page of a file. On NFS, a machine that has read the page may
    write all of it back (nfs_can_extend_write in Linux); one that cannot read writes only its own
    bytes.

    Args:
        descriptor: of the file.
        path: its name, for systems that cannot do it by descriptor.

    Raises:
        OutputError: the name is another file's by now.
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    again = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    one, other = os.fstat(descriptor), os.fstat(again)
    if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino):
        os.close(again)
        raise OutputError(f"{path}: was replaced by another program while it was opened; run again")
    return again


def join_temporary(
    path: Path, output: Path, *, is_folder: bool, is_locked: bool, check: Callable[[], None]
) -> int:
    """Hold the lock of a temporary that another process shares (:meth:`Temporary.share`).

    Args:
        path: of the temporary.
        output: what it is going to be, for messages.
        is_folder: what it is.
        is_locked: whether it has a lock.
        check: is called while it is not seen yet, and raises if that is in vain.

    Returns:
        A descriptor, whose closing lets go of the lock.

    Raises:
        OutputError: it is not seen here, or no longer its maker's.
    """
    # On network file systems a shared lock needs a descriptor that can read.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    flags |= os.O_DIRECTORY if is_folder else 0
    until = time.monotonic() + _SEEN_WITHIN_SECONDS
    while True:
        with suppress(FileNotFoundError):
            descriptor = os.open(path, flags)
            break
        if time.monotonic() > until:
            raise OutputError(
                f"{path}: was made by rank 0, but is not seen here; the ranks' machines must "
                "share the output's file system"
            )
        check()
        time.sleep(_LOOK_EVERY_SECONDS)
    try:
        found = os.fstat(descriptor)
        expected = stat.S_ISDIR(found.st_mode) if is_folder else stat.S_ISREG(found.st_mode)
        if not expected:
            raise OutputError(f"{path}: is not what rank 0 has begun; run again")
        if is_locked:
            lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _another_run(output) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _another_run(output: Path) -> OutputError:
    return OutputError(
        f"{output}: another run is writing it; wait until it is done, or name another output"
    )
