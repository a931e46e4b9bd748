"""How much memory this process has taken, as the operating system counts it."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident() -> int | None:
    """The most bytes that were resident at a time since the start, mapped files and code counted.

    Returns:
        None where the system does not tell.
    """
    try:
        # What getrusage tells on Linux begins with the peak of the process that started this one.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
