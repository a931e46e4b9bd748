"""Where an output really goes: links at the end of its name resolved, descriptors recognised."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from know_cli.errors import OutputError

_MOST_LINKS = 40  # as many as Linux follows
_DESCRIPTORS = re.compile(r"/proc/(\d+|self)(/task/\d+)?/fd")


def open_descriptor_of(path: Path) -> int | None:
    """The descriptor that a name such as ``/dev/stdout`` or ``/dev/fd/3`` stands for.

    Returns:
        Its number; None for every other name.

    Raises:
        OutputError: it is one of another process.
    """
    for place in _chain(path):
        match = _DESCRIPTORS.fullmatch(os.path.realpath(place.parent))
        if match and place.name.isdecimal() and place.is_symlink():
            if match[1] not in ("self", str(os.getpid())):
                raise OutputError(
                    f"{path}: is what another process has open; name a file, or /dev/stdout"
                )
            return int(place.name)
    return None


def destination(path: Path) -> Path:
    """The place that a name leads to: its own, unless it is a link.

    The link stays where it is, and what it leads to is written or replaced, as a shell would
    have it. What it leads to need not exist.

    Raises:
        OutputError: a link belongs to another user, who may have set it as a trap, or leads to an
            open descriptor.
        OSError: there is a circle of links.
    """
    if open_descriptor_of(path) is not None:
        raise OutputError(f"{path}: is an open descriptor, not a file; name a file")
    *links, place = _chain(path)
    if place.name in ("", ".."):
        place = place.resolve()
    for link in links:
        if link.lstat().st_uid not in (os.geteuid(), 0):
            raise OutputError(
                f"{path}: is a link that another user has made, so it may lead anywhere; name the "
                "file itself"
            )
    return place


def _chain(path: Path) -> list[Path]:
    """A name, what it links to, what that links to, and so on to the end."""
    places = [path]
    while stat.S_ISLNK(_mode(places[-1])):
        if len(places) > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if _DESCRIPTORS.fullmatch(os.path.realpath(places[-1].parent)):
            break  # what it says, such as pipe:[4711], is no name
        places.append(places[-1].parent / places[-1].readlink())
    return places


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
