"""The kernel alone, in memory, against the reference module and a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from know_cli.benchmark.timing import Times, take_turns
from know_cli.kinds import Kind
from know_cli.known.bundle import Bundle
from know_cli.known.module import FEATURES, HIDDEN, SQUEEZED, Known, has_factor
from know_cli.known.native_kernel import NativeKernel, trouble_with_native
from know_cli.known.preparation import Preparation
from know_cli.known.torch_kernel import Kernel

#: Rows that the reference module takes at a time.
CHUNK_ROWS = 100_000
_GEMM_SIZE = 1024
GEMM_FLOP = 2 * _GEMM_SIZE**3
GEMM = "matrix product"


def flop(checkpoints: int) -> int:
    """Floating-point operations per parameter and step: the folded algebra's matrix products.

    A factor on θ0 takes 128 more, which are not counted.

    >>> flop(5)
    14736
    """
    inputs = 2 * checkpoints - 1
    laws = 2 * (2 * SQUEEZED * HIDDEN + SQUEEZED * FEATURES + HIDDEN * FEATURES)
    return 2 * (inputs * (HIDDEN + SQUEEZED) + laws + 2 * FEATURES)


def kernel_name(preparation: Preparation) -> str:
    """The kernel's name in tables."""
    return f"kernel, {preparation.value} windows"


def native_name(preparation: Preparation) -> str:
    """The compiled kernel's name in tables."""
    return f"native kernel, {preparation.value} windows"


def reference_name(preparation: Preparation) -> str:
    """The readable module's name in tables."""
    return f"reference module, {preparation.value} windows"


def measure_kernels(bundle: Bundle, rows: int, rounds: int, threads: int) -> dict[str, Times]:
    """Time one step of the kernel and of the reference module, and one matrix product of 1024³.

    Both preparations are measured, whichever the bundle was trained for.

    Args:
        bundle: whose conv weights are used.
        rows: parameters per step.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.
        threads: for each of them.

    Returns:
        Times by name.
    """
    generator = torch.Generator().manual_seed(0)
    history = random_walks(bundle.checkpoints, rows, generator)
    state, out = bundle.states[Kind.CONV], torch.empty(rows)
    square, product = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE, generator=generator)
    with (
        torch_threads(threads),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        cases: dict[str, Callable[[], object]] = {
            GEMM: lambda: torch.mm(square, square, out=product)
        }
        for preparation in Preparation:
            for name, kernel in kernels_of(state, bundle.checkpoints, preparation).items():
                cases[name] = in_blocks(kernel, history, out, pool, threads)
            module = Known(bundle.checkpoints, preparation, factor=bundle.factor)
            module.load_state_dict(state)
            cases[reference_name(preparation)] = in_chunks(module, history, out)
        return take_turns(cases, rounds)


def kernels_of(
    state: dict[str, Tensor], checkpoints: int, preparation: Preparation
) -> dict[str, Kernel | NativeKernel]:
    """The kernels that run a hyper-model on the CPU here, by their names in tables.

    Args:
        state: of a hyper-model.
        checkpoints: S.
        preparation: of windows.
    """
    kernels: dict[str, Kernel | NativeKernel] = {}
    if trouble_with_native(checkpoints, factor=has_factor(state)) is None:
        kernels[native_name(preparation)] = NativeKernel(state, checkpoints, preparation)
    own = Kernel(state, checkpoints, preparation, torch.device("cpu"))
    return kernels | {kernel_name(preparation): own}


def random_walks(checkpoints: int, rows: int, generator: torch.Generator) -> Tensor:
    """Histories of the magnitude of weights: ``[checkpoints, rows]`` float32, θ0 last."""
    walk = torch.randn(checkpoints, rows, generator=generator) * 0.01
    return (walk.cumsum(0) + torch.randn(rows, generator=generator) * 0.05).contiguous()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give torch's own operations this many threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_blocks(
    kernel: Kernel | NativeKernel,
    history: Tensor,
    out: Tensor,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Callable[[], None]:
    """A function that runs one step of a kernel in blocks, in threads of a pool.

    Args:
        kernel: predicts a block.
        history: ``[S, rows]`` float32, θ0 last.
        out: ``[rows]`` float32, receives the predictions.
        pool: of so many threads.
        threads: their number.
    """
    block = kernel.block_rows
    blocks = list(zip(torch.split(history, block, 1), torch.split(out, block), strict=True))

    def some(first: int) -> None:
        for one, answer in blocks[first::threads]:
            kernel.predict(one, answer)

    def run() -> None:
        for job in [pool.submit(some, first) for first in range(threads)]:
            job.result()

    return run


def in_chunks(
    module: Callable[[Tensor], Tensor], history: Tensor, out: Tensor
) -> Callable[[], None]:
    """A function that runs one step of a module in chunks of :data:`CHUNK_ROWS`.

    Args:
        module: ``[rows, S]`` → ``[rows]``.
        history: ``[S, rows]`` float32.
        out: ``[rows]`` float32, receives the predictions.
    """
    windows = history.T.contiguous()

    def run() -> None:
        with torch.no_grad():
            for one, answer in zip(
                torch.split(windows, CHUNK_ROWS), torch.split(out, CHUNK_ROWS), strict=True
            ):
                answer.copy_(module(one))

    return run
