"""KNOWN on CPUs with AVX2, compiled (``native_kernel.c``): many blocks at once on as many threads.

torch's kernel launches eighteen operations a block, each of which needs Python's interpreter lock,
so that threads wait for one another; and each writes to the cache what the next one reads. This
one does a parameter's whole arithmetic in registers and the first-level cache, in one call without
the lock. It is compiled when the package is built, where there is a C compiler.

What was weighed against it, for the same purpose:

- ``torch.jit.script`` of the loop over blocks gives threads that scale and the same bytes as
  today, but is deprecated, and does not run on Python 3.14.
- ``torch.compile`` needs a C++ compiler on every user's machine, and twenty seconds at each start.
- numba would be one more dependency, larger than all others but torch, and its matrix products are
  those of the library that torch's kernel calls, again through the cache.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from know_cli.known.folding import Affine, fold
from know_cli.known.module import FEATURES, HIDDEN, SQUEEZED, has_factor
from know_cli.known.preparation import Preparation
from know_cli.known.torch_kernel import CPU_BLOCK_ROWS
from know_cli.passes.library import load_library

#: The most checkpoints that it takes (``MOST_CHECKPOINTS``).
MOST_CHECKPOINTS = 32
#: The library, beside this file, where one was compiled.
LIBRARY = Path(__file__).with_name("_native.so")


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is none, or this machine cannot run it."""
    library = load_library(LIBRARY)
    if library is None:
        return None
    try:
        library.known_supported.restype = ctypes.c_int
        library.known_predict.restype = None
        library.known_predict.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p,
            ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_void_p,
        ]  # fmt: skip
    except AttributeError:  # another library
        return None
    return library if library.known_supported() else None


def trouble_with_native(checkpoints: int, *, factor: bool = False) -> str | None:
    """The reason why the kernel cannot run here; None if it can.

    Args:
        checkpoints: S.
        factor: whether the hyper-model has a factor on θ0, which only torch's kernel computes.
    """
    if factor:
        return "it has no second output, which a KNOWN with a factor needs"
    if checkpoints > MOST_CHECKPOINTS:
        return f"it reads at most {MOST_CHECKPOINTS} checkpoints"
    if not LIBRARY.is_file():
        return "it was not compiled when know-predict was installed"
    if _library() is None:
        return "its library is damaged, or this machine cannot run it (it needs AVX2)"
    return None


class NativeKernel:
    """One hyper-model, packed. Safe to call from several threads, which do not wait for each other.

    Args:
        state: state dict of a :class:`~know_cli.known.module.Known`, float32.
        checkpoints: S.
        preparation: what is done to a window first.

    Attributes:
        block_rows: rows per block, as of torch's kernel.
        thread_bytes: main memory that it needs in each thread: none but the stack.

    Raises:
        RuntimeError: it cannot run here, or not with this hyper-model.
    """

    block_rows = CPU_BLOCK_ROWS
    thread_bytes = 0

    def __init__(
        self, state: dict[str, Tensor], checkpoints: int, preparation: Preparation
    ) -> None:
        library = _library()
        trouble = trouble_with_native(checkpoints, factor=has_factor(state))
        if library is None or trouble is not None:
            raise RuntimeError(trouble)
        self._call = library.known_predict
        self._weights = packed(state)
        self._checkpoints = checkpoints
        self._prepared = int(preparation is Preparation.SPREAD)

    def predict(self, history: Tensor, out: Tensor) -> None:
        """Predict one step of any number of rows.

        Args:
            history: ``[S, rows]`` float32 on the CPU, most-forgotten first, θ0 last; the rows of
                a checkpoint lie together.
            out: ``[rows]`` contiguous float32, receives θ̂(−1).
        """
        assert history.dtype == out.dtype == torch.float32
        assert history.shape == (self._checkpoints, len(out))
        assert history.stride(1) == out.stride(0) == 1 or len(out) <= 1
        self._call(
            self._weights.data_ptr(), self._checkpoints, self._prepared,
            history.data_ptr(), history.stride(0), len(out), out.data_ptr(),
        )  # fmt: skip


def packed(state: dict[str, Tensor]) -> Tensor:
    """The weights in the order in which the kernel reads them, float32.

    The head's bias; then of each stream, four outputs at a time, their biases and for each input
    their four weights: of the squeeze; of input, rate and amplitude by turns; of ``linear`` with
    the columns of ``output`` as further inputs, and the head's four weights.
    """
    head = state["head.weight"].double().flatten()
    parts = [state["head.bias"].double()]
    for number, name in enumerate(("window", "difference")):
        of = fold(state, name)
        for at in range(0, SQUEEZED, 4):
            parts += _four(of.squeeze, at)
        for at in range(0, HIDDEN, 4):
            for layer in (of.input, of.rate, of.amplitude):
                parts += _four(layer, at)
        for at in range(0, FEATURES, 4):
            parts += _four(of.linear, at)
            parts.append(of.output[at : at + 4].T.flatten())
            parts.append(head[number * FEATURES + at :][:4])
    return torch.cat(parts).float()


def _four(layer: Affine, at: int) -> list[Tensor]:
    return [layer.bias[at : at + 4], layer.weight[at : at + 4].T.flatten()]
