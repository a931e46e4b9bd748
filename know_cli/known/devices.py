"""Chooses the kernel that runs KNOWN on a device, and tries it before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from know_cli.engine.lanes import (
    LANES,
    CudaQueue,
    DeviceKernel,
    DevicePredictor,
    Direct,
    Lane,
    failures_of,
    first_line,
)
from know_cli.engine.plan import Batch
from know_cli.errors import UsageError
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle
from know_cli.known.kernels import AUTO, TORCH, TRITON
from know_cli.known.torch_kernel import DEVICE_BLOCK_ROWS, Kernel, TorchSteps

_CPU = torch.device("cpu")


# Enough rows for several programs of Triton's kernel, the last one not full.
_TRIED_ROWS = 200


def open_devices(
    bundle: Bundle, steps: int, devices: Sequence[torch.device], wish: str = AUTO
) -> DevicePredictor:
    """Open KNOWN on devices other than the CPU.

    Args:
        bundle: the weights.
        steps: how many are predicted.
        devices: all of one type.
        wish: name of a kernel.

    Returns:
        The predictor. On CUDA it uses Triton's kernel, unless another is wished for, which is
        compiled and tried here. If Triton is missing, or fails on one of the devices, all devices
        use torch's kernel, since the two round differently, and a notice says why; so they do
        where the bundle has a factor on θ0.

    Raises:
        UsageError: a device fails, or the kernel that is wished for.
    """
    kernel, notices = TORCH, []
    if devices[0].type == "cuda" and wish != TORCH:
        trouble = _trouble_with_triton(bundle, steps, devices)
        if trouble is None:
            kernel = TRITON
        elif wish == TRITON:
            raise UsageError(f"--kernel {TRITON}: {trouble}; leave it out")
        else:
            notices.append(f"{trouble}; KNOWN runs through plain torch operations")
    lanes: list[list[Lane]] = []
    for device in devices:
        with failures_of(device):
            kernels = triton_kernels if kernel == TRITON else torch_kernels
            lanes.append(open_lanes(bundle, steps, device, kernels))
    in_turn = [lane for of_turn in zip(*lanes, strict=True) for lane in of_turn]
    return DevicePredictor(in_turn, bundle.checkpoints, kernel, notices)


def _trouble_with_triton(bundle: Bundle, steps: int, devices: Sequence[torch.device]) -> str | None:
    """The reason why Triton's kernel cannot be used; None if it works on all devices."""
    if bundle.factor:
        return "Triton's kernel has no second output, which a KNOWN with a factor needs"
    for device in devices:
        try:
            (lane, *_) = open_lanes(bundle, steps, device, triton_kernels)
            _try(lane, bundle, steps)
        except ModuleNotFoundError:
            return "Triton is not installed"
        except Exception as error:  # Triton's own, or from a compiler that it calls
            return f"Triton's kernel does not work on {device} ({first_line(error)})"
    return None


def open_lanes(
    bundle: Bundle,
    steps: int,
    device: torch.device,
    kernels: Callable[[Bundle, int, torch.device, int], dict[Kind, DeviceKernel]],
    block_rows: int = DEVICE_BLOCK_ROWS,
) -> list[Lane]:
    """Open the lanes of one device, each with its own kernels for blocks of ``block_rows``."""
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
    """Make Triton's kernels, which take any number of steps and rows.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from know_cli.known.triton_kernel import TritonKernel

    return {
        kind: TritonKernel(state, bundle.checkpoints, bundle.preparation, device)
        for kind, state in bundle.states.items()
    }


def torch_kernels(
    bundle: Bundle, steps: int, device: torch.device, block_rows: int
) -> dict[Kind, DeviceKernel]:
    """Make torch's kernels, which share a workspace: a lane works on one kind at a time."""
    # Of a lane, not of the threads that take turns with it.
    local = SimpleNamespace()
    return {
        kind: TorchSteps(
            Kernel(state, bundle.checkpoints, bundle.preparation, device, local, block_rows), steps
        )
        for kind, state in bundle.states.items()
    }


def _try(lane: Lane, bundle: Bundle, steps: int) -> None:
    """Compare a lane with torch's kernel on the CPU, for a few windows of each kind.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    (torch_lane, *_) = open_lanes(bundle, steps, _CPU, torch_kernels, _TRIED_ROWS)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(bundle.checkpoints, _TRIED_ROWS, generator=generator) * 0.1
    for kind in bundle.states:
        block = Batch(kind, (), _TRIED_ROWS).block(slice(0, _TRIED_ROWS))
        actual, expected = torch.full((2, steps, _TRIED_ROWS), torch.nan)
        for one, out in ((lane, actual), (torch_lane, expected)):
            one.start(block, windows, out)
            one.finish()
        if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError("its answers are not those of torch's kernel")
