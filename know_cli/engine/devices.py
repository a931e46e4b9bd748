"""Which devices there are, and what runs KNOWN on them: Triton's kernel on CUDA, else torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from know_cli.engine.device_names import check_device_name
from know_cli.engine.kernel import DEVICE_BLOCK_ROWS, Kernel
from know_cli.engine.lanes import (
    LANES,
    CudaQueue,
    DeviceKernel,
    DevicePredictor,
    Direct,
    Lane,
    TorchSteps,
    failures_of,
    first_line,
)
from know_cli.errors import UsageError
from know_cli.hypermodel import Bundle
from know_cli.kinds import Kind

_CPU = torch.device("cpu")
# Several programs of Triton's kernel, the last one with fewer rows.
_TRIED_ROWS = 200


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
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(kind == "cpu" or torch.backends.mps.is_available())


def _seen(kind: str, count: int) -> str:
    return f"torch sees {count or 'no'} {kind.upper()} device{'s' * (count != 1)} here"


def open_devices(bundle: Bundle, steps: int, devices: Sequence[torch.device]) -> DevicePredictor:
    """KNOWN on devices that are not the CPU.

    Args:
        bundle: the weights.
        steps: how many are predicted.
        devices: all of one type.

    Returns:
        What predicts. On CUDA that is Triton's kernel, compiled and tried here; where there is
        no Triton, or it does not work on one of the devices, it is torch's kernel on all of them,
        since they round differently, and a notice says why.

    Raises:
        UsageError: a device fails.
    """
    kernel, notices = "torch", []
    if devices[0].type == "cuda":
        trouble = _trouble_with_triton(bundle, steps, devices)
        if trouble is None:
            kernel = "triton"
        else:
            notices.append(f"{trouble}; KNOWN runs through plain torch operations")
    lanes: list[list[Lane]] = []
    for device in devices:
        with failures_of(device):
            kernels = triton_kernels if kernel == "triton" else torch_kernels
            lanes.append(open_lanes(bundle, steps, device, kernels))
    in_turn = [lane for of_turn in zip(*lanes, strict=True) for lane in of_turn]
    return DevicePredictor(in_turn, bundle.checkpoints, kernel, notices)


def _trouble_with_triton(bundle: Bundle, steps: int, devices: Sequence[torch.device]) -> str | None:
    """Why Triton's kernel cannot be used; None if it works on all devices."""
    for device in devices:
        try:
            (lane, *_) = open_lanes(bundle, steps, device, triton_kernels)
            _try(lane, bundle, steps)
        except ModuleNotFoundError:
            return "Triton is not installed"
        except Exception as error:  # Triton's own, and those of the compilers that it calls
            return f"Triton's kernel does not work on {device} ({first_line(error)})"
    return None


def open_lanes(
    bundle: Bundle,
    steps: int,
    device: torch.device,
    kernels: Callable[[Bundle, int, torch.device, int], dict[Kind, DeviceKernel]],
    block_rows: int = DEVICE_BLOCK_ROWS,
) -> list[Lane]:
    """The lanes of one device, each with kernels of its own for blocks of ``block_rows``."""
    return [
        Lane(
            kernels(bundle, steps, device, block_rows),
            bundle.checkpoints,
            steps,
            block_rows,
            device,
            CudaQueue(device) if device.type == "cuda" else Direct(),
        )
        for _ in range(LANES)
    ]


def triton_kernels(
    bundle: Bundle, steps: int, device: torch.device, block_rows: int
) -> dict[Kind, DeviceKernel]:
    """Triton's, which take any number of steps and rows.

    Raises:
        ModuleNotFoundError: there is no Triton.
    """
    from know_cli.engine.triton_kernel import TritonKernel

    return {
        kind: TritonKernel(state, bundle.checkpoints, bundle.preparation, device)
        for kind, state in bundle.states.items()
    }


def torch_kernels(
    bundle: Bundle, steps: int, device: torch.device, block_rows: int
) -> dict[Kind, DeviceKernel]:
    """Torch's, which share a workspace: a lane is at one kind at a time."""
    local = threading.local()
    return {
        kind: TorchSteps(
            Kernel(state, bundle.checkpoints, bundle.preparation, device, local, block_rows), steps
        )
        for kind, state in bundle.states.items()
    }


def _try(lane: Lane, bundle: Bundle, steps: int) -> None:
    """Compare a lane with torch's kernel on the CPU, for a few windows of each kind.

    Raises:
        RuntimeError: it differs by more than rounding can do.
    """
    (torch_lane, *_) = open_lanes(bundle, steps, _CPU, torch_kernels, _TRIED_ROWS)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(bundle.checkpoints, _TRIED_ROWS, generator=generator) * 0.1
    for kind in bundle.states:
        actual, expected = torch.full((2, steps, _TRIED_ROWS), torch.nan)
        for one, out in ((lane, actual), (torch_lane, expected)):
            one.start(kind, windows, out)
            one.finish()
        if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError("its answers are not those of torch's kernel")
