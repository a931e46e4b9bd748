"""One step in the memory of a device other than the CPU: what runs KNOWN there, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from know_cli.benchmark.kernels import in_chunks, random_walks
from know_cli.benchmark.timing import Times, take_turns
from know_cli.engine.lanes import DeviceKernel
from know_cli.engine.plan import Batch
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle
from know_cli.known.devices import torch_kernels, triton_kernels
from know_cli.known.torch_kernel import DEVICE_BLOCK_ROWS

TRITON = "Triton kernel"
TORCH = "torch operations"
MODULE = "reference module"
COMPILED = "reference module, compiled"


def measure_device(
    bundle: Bundle, device: torch.device, rows: int, rounds: int
) -> dict[str, Times]:
    """Time one step for parameters that are on the device and stay there.

    Args:
        bundle: whose conv weights are used.
        device: to measure.
        rows: number of parameters.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.

    Returns:
        Times by name. Triton is left out where it is not installed or does not support the
        device, the compiled module everywhere but on CUDA.
    """
    history = random_walks(bundle.checkpoints, rows, torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(1, rows, device=device)
    cases: dict[str, Callable[[], object]] = {}
    if device.type == "cuda":
        # Triton may be missing, or may not support the device.
        with suppress(ImportError, RuntimeError):
            kernel = triton_kernels(bundle, 1, device, DEVICE_BLOCK_ROWS)[Kind.CONV]
            cases[TRITON] = _in_blocks(kernel, history, out, rows)
    kernel = torch_kernels(bundle, 1, device, DEVICE_BLOCK_ROWS)[Kind.CONV]
    cases[TORCH] = _in_blocks(kernel, history, out, DEVICE_BLOCK_ROWS)
    module = bundle.module(Kind.CONV).to(device)
    cases[MODULE] = in_chunks(module, history, out[0])
    if device.type == "cuda":
        cases[COMPILED] = in_chunks(torch.compile(module), history, out[0])
    # Triton launches on the current device, wherever the memory is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return take_turns({name: _to_the_end(case, out) for name, case in cases.items()}, rounds)


def _in_blocks(
    kernel: DeviceKernel, history: Tensor, out: Tensor, block_rows: int
) -> Callable[[], None]:
    batch = Batch(Kind.CONV, (), out.shape[1])
    starts = range(0, batch.rows, block_rows)
    blocks = [batch.block(slice(start, min(start + block_rows, batch.rows))) for start in starts]

    def run() -> None:
        for block in blocks:
            kernel.predict(block, history[:, block.rows], out[:, block.rows])

    return run


def _to_the_end(case: Callable[[], object], out: Tensor) -> Callable[[], None]:
    def run() -> None:
        case()
        # Reading a number waits for all work queued on the device.
        float(out[0, -1])

    return run
