"""Would bfloat16 do? The kernel with its largest products in bfloat16: its speed and its errors."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.kinds import PREDICTED_KINDS
from know_cli.known.bundle import Bundle
from know_cli.known.module import FEATURES, HIDDEN, Preparation
from know_cli.known.torch_kernel import Kernel, Stream

#: Quantiles of the errors that are published.
QUANTILES = (0.5, 0.9, 0.99, 0.999)
#: Output dtypes, as safetensors calls them, for which less than float32 could be enough.
DTYPES = ("BF16", "F16")


@dataclass(frozen=True)
class Errors:
    """How far results are from those of float32 products, before either is rounded for output.

    Attributes:
        kind: of KNOWN.
        dtype: of the checkpoints.
        within_half: share of values less than half a unit in the last place of it away.
        quantiles: of the distances, in such units, as in :data:`QUANTILES`.
    """

    kind: str
    dtype: str
    within_half: float
    quantiles: tuple[float, ...]


class HalfKernel(Kernel):
    """The kernel with the products that are more than half of its work in bfloat16.

    The others have too few inputs to gain: with all of them in bfloat16 it is slower still, and
    less exact.
    """

    @cached_property
    def _halves(self) -> dict[int, Tensor]:
        return {id(stream): stream.output.bfloat16() for stream in self._streams}

    @cached_property
    def _buffers(self) -> threading.local:
        return threading.local()

    def _add_output(self, stream: Stream, y: Tensor, features: Tensor) -> None:
        buffers = self._buffers.__dict__
        if not buffers:
            buffers["y"] = torch.empty(len(y), HIDDEN, dtype=torch.bfloat16)
            buffers["product"] = torch.empty(len(y), FEATURES, dtype=torch.bfloat16)
        half = buffers["y"].copy_(y)
        features.add_(torch.mm(half, self._halves[id(stream)], out=buffers["product"]))


def measure_errors(bundle: Bundle, preparation: Preparation, history: Tensor) -> list[Errors]:
    """Errors of :class:`HalfKernel` in one step, for each kind and output dtype.

    Args:
        bundle: whose weights are used.
        preparation: of windows.
        history: ``[S, rows]`` float32, most-forgotten first, finite.
    """
    found = []
    cpu = torch.device("cpu")
    for kind in PREDICTED_KINDS:
        exact, half = (
            make(bundle.states[kind], bundle.checkpoints, preparation, cpu)
            for make in (Kernel, HalfKernel)
        )
        for name in DTYPES:
            dtype = torch_dtype(name)
            stored = history.to(dtype).float()
            expected, answer = (_predict(kernel, stored) for kernel in (exact, half))
            distance = (answer - expected).abs() / units(expected, dtype)
            found.append(
                Errors(
                    kind.value,
                    name,
                    float((distance < 0.5).double().mean()),
                    # Torch's own takes no more than 2²⁴ values.
                    tuple(np.quantile(distance.double().numpy(), QUANTILES).tolist()),
                )
            )
    return found


def units(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of a dtype at each value, float32.

    Args:
        values: float32, finite.
        dtype: of a smaller float.
    """
    of = torch.finfo(dtype)
    _, exponents = torch.frexp(values.abs().clamp(min=of.smallest_normal))
    return of.eps * torch.exp2((exponents - 1).float())


def _predict(kernel: Kernel, history: Tensor) -> Tensor:
    out = torch.empty(history.shape[1])
    blocks = (torch.split(tensor, kernel.block_rows, -1) for tensor in (history, out))
    for block, answer in zip(*blocks, strict=True):
        kernel.predict(block, answer)
    return out
