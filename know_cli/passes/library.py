"""Loads what was compiled when the package was built (``hatch_build.py``).

The libraries have nothing of Python or torch in them, so that one file serves all their versions,
and what they do takes no interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from know_cli.files import open_file

# How an ELF file of 64-bit, little-endian machines begins, and where its table of sections is.
_ELF_64 = b"\x7fELF\x02\x01"
_ELF = struct.Struct("<40xQ10xHH2x")


def load_library(path: Path) -> ctypes.CDLL | None:
    """A compiled library; None where there is none, or it cannot be loaded."""
    try:
        return ctypes.CDLL(str(path)) if _is_whole(path) else None
    except OSError:
        return None


def _is_whole(path: Path) -> bool:
    """Whether a library was not cut off: loading one that was can end the process (SIGBUS).

    The table of sections is the last thing in an ELF file. Libraries of other forms count as whole.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    with open_file(path) as file:
        start = file.read(_ELF.size)
        size = os.fstat(file.fileno()).st_size
    if len(start) < _ELF.size or not start.startswith(_ELF_64):
        return True
    table, entry_bytes, entries = _ELF.unpack(start)
    return bool(table + entry_bytes * entries <= size)
