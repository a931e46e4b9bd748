"""What a device may be called; known without torch, which command lines import late."""

from __future__ import annotations

import re

from know_cli.errors import UsageError

#: As a help text shows them.
DEVICE_NAMES = "auto|cpu|cuda[:i]|cuda:all|mps|xpu"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+|:all)?|mps|xpu", re.ASCII)


def check_device_name(name: str) -> None:
    """Refuse a name that no machine has a device for.

    Raises:
        UsageError: with the names that there are.
    """
    if _DEVICE.fullmatch(name) is None:
        raise UsageError(
            f"--device {name or repr(name)}: is none of auto, cpu, cuda, cuda:0 …, cuda:all, mps, "
            "xpu"
        )
