"""One step in the memory of a device that is not the CPU: what runs KNOWN there, and rivals."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from know_cli.benchmark.kernels import random_walks
from know_cli.benchmark.timing import Times, take_turns
from know_cli.engine.devices import torch_kernels, triton_kernels
from know_cli.engine.kernel import DEVICE_BLOCK_ROWS
from know_cli.engine.lanes import DeviceKernel
from know_cli.hypermodel import Bundle
from know_cli.kinds import Kind

TRITON = "Triton kernel"
TORCH = "torch operations"
MODULE = "reference module"
COMPILED = "reference module, compiled"


def measure_device(
    bundle: Bundle, device: torch.device, rows: int, rounds: int
) -> dict[str, Times]:
    """Times of one step for ``rows`` parameters that are on the device and stay there.

    What is missing is left out: Triton where it is not installed or does not suit the device, the
    compiled module on anything but CUDA.
    """
    history = random_walks(bundle.checkpoints, rows, torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(1, rows, device=device)
    cases: dict[str, Callable[[], object]] = {}
    for name, kernels in ((TRITON, triton_kernels), (TORCH, torch_kernels)):
        if name == TRITON and device.type != "cuda":
            continue
        try:
            kernel = kernels(bundle, 1, device, DEVICE_BLOCK_ROWS)[Kind.CONV]
        except (ImportError, RuntimeError):  # no Triton, or a device that it does not suit
            continue
        # Triton's takes any number of rows at once.
        cases[name] = _in_blocks(kernel, history, out, rows if name == TRITON else None)
    module = bundle.module(Kind.CONV).to(device)
    cases[MODULE] = _module(module, history, out)
    if device.type == "cuda":
        cases[COMPILED] = _module(torch.compile(module), history, out)
    # Triton starts programs on the current device, whatever the memory is on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return take_turns(cases, rounds)


def _in_blocks(
    kernel: DeviceKernel, history: Tensor, out: Tensor, block_rows: int | None
) -> Callable[[], None]:
    blocks = [torch.split(part, block_rows or DEVICE_BLOCK_ROWS, 1) for part in (history, out)]

    def run() -> None:
        for block, answer in zip(*blocks, strict=True):
            kernel.predict(block, answer)
        _wait(out)

    return run


def _module(module: Callable[[Tensor], Tensor], history: Tensor, out: Tensor) -> Callable[[], None]:
    windows = history.T.contiguous()

    def run() -> None:
        with torch.no_grad():
            for block, answer in zip(
                torch.split(windows, DEVICE_BLOCK_ROWS),
                torch.split(out[0], DEVICE_BLOCK_ROWS),
                strict=True,
            ):
                answer.copy_(module(block))
        _wait(out)

    return run


def _wait(out: Tensor) -> None:
    """A number can be read only when all that was told the device before is done."""
    float(out[0, -1])
