"""The operating system's locks, which end with their process."""

from __future__ import annotations

import errno
import fcntl

# What systems answer where there is nothing to lock with (NFS answers EBADF for folders).
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP}


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
