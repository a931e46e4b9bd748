"""Which devices there are, and what they are called; imports torch only to look for one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from know_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

#: As a help text shows them.
DEVICE_NAMES = "auto|cpu|cuda[:i]|cuda:all|mps|xpu"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+|:all)?|mps|xpu", re.ASCII)


def check_device_name(name: str) -> None:
    """Refuse a name that no machine has a device for.

    Raises:
        UsageError: it is none of the known devices; the message lists them.
    """
    if _DEVICE.fullmatch(name) is None:
        raise UsageError(
            f"--device {name or repr(name)}: is none of auto, cpu, cuda, cuda:0 …, cuda:all, mps, "
            "xpu"
        )


def choose_devices(wanted: str, local_rank: int | None = None) -> tuple[torch.device, ...]:
    """The devices of a name: one, or with ``cuda:all`` every CUDA device of this machine.

    ``auto`` is a CUDA device if there is one, else the CPU.

    Args:
        wanted: the name.
        local_rank: number of this process among those on this machine that share a prediction;
            with ``auto`` and ``cuda`` they take one CUDA device each. None where there is one.

    Raises:
        UsageError: no device has such a name, there is none here, or with ``cuda:all`` they are
            not of one model.
    """
    import torch

    check_device_name(wanted)
    if local_rank is not None and wanted in ("auto", "cuda") and torch.cuda.is_available():
        return (torch.device("cuda", local_rank % torch.cuda.device_count()),)
    if wanted == "auto":
        return (torch.device("cuda" if torch.cuda.is_available() else "cpu"),)
    if wanted == "cuda:all":
        return _all_cuda()
    kind, _, index = wanted.partition(":")
    count = _count(kind)
    if int(index or 0) >= count:
        raise UsageError(f"--device {wanted}: {_seen(kind, count)}; use cpu")
    return (torch.device(wanted),)


def _all_cuda() -> tuple[torch.device, ...]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names:
        raise UsageError(f"--device cuda:all: {_seen('cuda', 0)}; use cpu")
    if len(set(names)) > 1:
        # Different processors round differently, and the bytes must not tell who did which block.
        raise UsageError(
            f"--device cuda:all: the devices are of different models, {', '.join(names)}; choose "
            "one, such as cuda:0, or hide the others with CUDA_VISIBLE_DEVICES"
        )
    return tuple(torch.device("cuda", index) for index in range(len(names)))


def _count(kind: str) -> int:
    """How many devices of a type torch sees."""
    import torch

    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(kind == "cpu" or torch.backends.mps.is_available())


def _seen(kind: str, count: int) -> str:
    return f"torch sees {count or 'no'} {kind.upper()} device{'s' * (count != 1)} here"
