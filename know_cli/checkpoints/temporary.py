"""Where an output is until it is complete: beside its place, locked, one a name.

The name is made from the output's, so that a run that was killed leaves at most one, and the
next run to the same output finds and empties it. The lock (``flock``) is the operating system's
and ends with its process: what is not locked is stale, whoever left it. Where a file system has
no locks, each run has a temporary of its own, and the last one to finish wins whole.

Ranks that write one output together hold one lock together: only when the last of them has ended
is it stale, so that no straggler of a killed run writes into the next run's temporary.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from know_cli.errors import OutputError
from know_cli.files import lock, temporary_name

_ATTEMPTS = 100
# Another machine may remember for a while that there was no such file (NFS does by default for
# up to half a minute).
_SEEN_WITHIN_SECONDS = 60.0
_LOOK_EVERY_SECONDS = 0.1


class Temporary:
    """A file or folder that this process alone writes.

    Attributes:
        path: where it is; empty at first.
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
        # A folder that exists may be a file system of its own, into which nothing can be renamed.
        self._folder = output if output.is_dir() else output.absolute().parent
        name = output.resolve().name if output.is_dir() else output.name
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        self.path = self._folder / f".know-{digest}.tmp"
        self._lock: int | None = None
        self._moved = False
        self._is_ours = False
        try:
            self._acquire()
        except BaseException:  # an interruption may come at any moment
            if self._is_ours:
                self.discard()
            raise

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
                if self._is_still(descriptor):
                    self._is_ours = True
                    self._empty(descriptor)
                    self._lock, descriptor = descriptor, -1
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
        try:
            if self._is_folder:
                self.path.mkdir()
                self._is_ours = True
            else:
                made = os.open(self.path, kind | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._is_ours = True
                return made
        except FileExistsError:
            # In a folder that all may write to, a stranger could have put it there.
            found = self.path.lstat()
            ours = stat.S_ISDIR(found.st_mode) if self._is_folder else stat.S_ISREG(found.st_mode)
            if (
                not ours
                or found.st_uid != os.geteuid()
                or (found.st_nlink > 1 and kind & os.O_RDWR)
            ):
                raise OutputError(
                    f"{self.path}: is not a temporary of this program and user, but is where one "
                    "must go; remove it, or name another output"
                ) from None
        return os.open(self.path, kind | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _is_still(self, descriptor: int) -> bool:
        """Whether what was locked still has the name: its writer may just have renamed it."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return False
        locked = os.fstat(descriptor)
        return (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino)

    def _empty(self, descriptor: int) -> None:
        """Take away what a run that was killed left."""
        if not self._is_folder:
            os.ftruncate(descriptor, 0)
            return
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _go_without_lock(self) -> None:
        if self._is_ours:
            self._remove()
        self.path = self._folder / temporary_name()
        if self._is_folder:
            self.path.mkdir()
        else:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        self._is_ours = True

    def share(self) -> bool:
        """Hold the lock together with those that :func:`join_temporary`.

        Returns:
            Whether there is a lock.

        Raises:
            OutputError: another run has taken it in this moment.
        """
        if self._lock is None:
            return False
        try:
            # Not atomic: the system gives up the one lock before it tries to get the other.
            lock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self._moved = True  # it is theirs now
            raise _another_run(self._output) from None
        if not self._is_still(self._lock):
            self._moved = True
            raise _another_run(self._output)
        return True

    def moved(self) -> None:
        """Note that it has the output's name now; its old name may be another run's."""
        self._moved = True

    def _remove(self) -> None:
        if self._is_folder:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove it, unless it was moved, and let go of the lock."""
        if not self._moved:
            self._remove()
            self._moved = True
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECTORY if is_folder else 0)
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
