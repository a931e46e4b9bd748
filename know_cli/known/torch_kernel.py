"""KNOWN for fixed blocks of rows, with the algebra folded and every buffer allocated once.

Layers are joined as in :mod:`~know_cli.known.folding`. Biases are part of the matrix products: the
windows and the squeezed features hold a row of ones, which both streams share. The last block is
padded, so every matrix product has the same shape, and a parameter's result does not depend on
what else is in its batch.

What was tried, on one thread of a shared two-core Xeon with AVX-512 and torch 2.13 with MKL, with
the variants alternating in one process. Times are nanoseconds per parameter per step. This kernel
takes 200 (222 for windows prepared by spread), its predecessor took 400 (485), and the reference
module takes 1500.

- Rows per block: 1024 and 1536 take 200, 2048 takes 210, 3072 takes 232, 4096 about 280. The two
  ``[rows, 64]`` buffers and the features must stay in the second-level cache (2 MiB per core).
  With 512 rows the interpreter's overhead between operations shows (238).
- Biases as a row of ones, instead of ``addmm``, which copies them first; and views that are made
  once: both together save 30.
- ``exp`` takes 20, ``exp2`` 32, numpy's ``exp2`` 21. With older versions of torch and MKL's ``exp``
  it was the other way round.
- Both streams in one buffer of 128 columns: one block-diagonal product for rates and amplitudes
  does twice the work (50 instead of 33), and separate products save nothing.
- Features × rows instead of rows × features: products with few inputs take a quarter longer (40
  instead of 32 for rates and amplitudes). Only the squeezed features are faster that way (3
  instead of 5), since MKL prefers a last dimension that is a multiple of 16.
- Padding the inputs of a product to 16: 13 instead of 8 for each of the small products.
- oneDNN's products fused with the multiplication or the leaky ReLU (private to torch): 25 to 40
  instead of 20 to 27 for each pair.
- For windows prepared by spread, numpy's ``arcsinh`` takes 2 and torch's 13, ``threshold_`` takes 1
  and a mask 4.
- ``torch.compile`` of the same algebra (Inductor with the machine's C++ compiler, with and without
  ``max_autotune``): 290 to 310, after 20 s of compiling.
- The largest products in bfloat16, with AMX: slower than float32 (``docs/results/speed.md``), since
  products this thin wait for conversions; they are also too inexact to be the default.

Each operation alone, in a loop: matrix products take 117 (a product of 1024 × 1024 matrices would
take 84 for as many operations); the exponential takes 20; multiplications and the leaky ReLU, which
wait for the cache and which eager torch cannot fuse with the products, take 34; the rest takes 7.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from know_cli.engine.plan import Block
from know_cli.known.folding import Affine, fold
from know_cli.known.module import FEATURES, HIDDEN, NEGATIVE_SLOPE, SQUEEZED, has_factor
from know_cli.known.preparation import Preparation

#: Rows of a block on a CPU.
CPU_BLOCK_ROWS = 1536
#: Rows of a block on other devices, where launching costs more than computing a small block.
DEVICE_BLOCK_ROWS = 1 << 17


class _Stream:
    """Folded weights of one stream, each [in, out], where one input is the constant 1.

    Args:
        state: state dict of a :class:`~know_cli.known.module.Known`.
        name: the stream's, ``window`` or ``difference``.
        ones_first: whether the row of ones comes first, as in the stream of differences, or last.
        device: where it runs.
    """

    def __init__(
        self, state: dict[str, Tensor], name: str, ones_first: bool, device: torch.device
    ) -> None:
        def with_bias(layer: Affine) -> Tensor:
            bias, weight = layer.bias[None], layer.weight.T
            return torch.cat([bias, weight] if ones_first else [weight, bias])

        def put(weight: Tensor) -> Tensor:
            return weight.float().contiguous().to(device)

        folded = fold(state, name)
        #: ``[inputs, 8]`` float64; :class:`Kernel` joins both streams'.
        self.squeeze = with_bias(folded.squeeze)
        self.input = put(with_bias(folded.input))
        self.amplitude = put(with_bias(folded.amplitude))
        self.rate = put(with_bias(folded.rate))
        self.linear = put(with_bias(folded.linear))
        self.output = put(folded.output.T)


class _Workspace:
    """Buffers for the intermediate results of one block, and views of them; one per thread.

    Views are made once, here, since making one costs about as much as launching an operation.

    Attributes:
        window: ``[2S, rows]``: the window, a row of ones, the differences.
        values, newest: the window in it, and its last row, the slot of θ0.
        newest_array: the same memory as ``newest`` for numpy on a CPU; None on other devices.
        later, earlier, differences: ``[S − 1, rows]``; ``differences`` is ``later − earlier``.
        squeezed: ``[17, rows]``: 8 features of the window, a row of ones, 8 of the differences.
        inputs: per stream its ``[rows, inputs]``, its ``[rows, 9]``, and where its features go.
        x, y: ``[rows, 64]``.
        features: ``[rows, 64]``.
        outputs: per output of the head its ``[rows, 1]``.
        flat: ``[rows]``, the same memory as the first of them, the change.
        factors: ``[rows]`` likewise of the second, the factor on θ0; none without one.
        origin: ``[rows]``, θ0 itself, where windows are prepared.
        magnitude: ``[S − 1, rows]``; ``spread`` and ``divisor``: ``[rows]``, for the preparation.
    """

    def __init__(self, rows: int, checkpoints: int, factor: bool, device: torch.device) -> None:
        self.nbytes = 0

        def new(*shape: int) -> Tensor:
            tensor = torch.empty(shape, device=device)
            self.nbytes += tensor.nbytes
            return tensor

        S = checkpoints
        self.window = new(2 * S, rows)
        self.window[S].fill_(1)
        self.values, self.newest = self.window[:S], self.window[S - 1]
        self.newest_array = self.newest.numpy() if device.type == "cpu" else None
        self.later, self.earlier = self.window[1:S], self.window[: S - 1]
        self.differences = self.window[S + 1 :]
        self.squeezed = new(2 * SQUEEZED + 1, rows)
        self.x, self.y = new(rows, HIDDEN), new(rows, HIDDEN)
        self.features = new(rows, 2 * FEATURES)
        self.inputs = [
            (
                self.window[: S + 1].T,
                self.squeezed[: SQUEEZED + 1].T,
                self.features[:, :FEATURES],
            ),
            (self.window[S:].T, self.squeezed[SQUEEZED:].T, self.features[:, FEATURES:]),
        ]
        self.outputs = [new(rows, 1) for _ in range(2 if factor else 1)]
        self.flat, *self.factors = (output.view(-1) for output in self.outputs)
        self.magnitude = new(S - 1, rows)
        self.origin, self.spread, self.divisor = new(rows), new(rows), new(rows)


class Kernel:
    """One hyper-model, folded, on one device. Safe to call from several threads.

    Args:
        state: state dict of a :class:`~know_cli.known.module.Known`, float32.
        checkpoints: S.
        preparation: what is done to a window first.
        device: where it runs.
        local: holds each thread's workspace, or one for threads that take turns; kernels for the
            same S and device may share it, if all or none of them have a factor on θ0.
        block_rows: rows per block; None takes the device's default.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        checkpoints: int,
        preparation: Preparation,
        device: torch.device,
        local: threading.local | SimpleNamespace | None = None,
        block_rows: int | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.preparation = preparation
        self.device = device
        own = CPU_BLOCK_ROWS if device.type == "cpu" else DEVICE_BLOCK_ROWS
        self.block_rows = block_rows or own
        self._streams = (
            _Stream(state, "window", False, device),
            _Stream(state, "difference", True, device),
        )
        self._squeeze = _join_squeeze(*self._streams).to(device)
        self._factor = has_factor(state)
        # A product for each output, so that the first is the same whether there is a second.
        weights, biases = (torch.split(state[f"head.{part}"], 1) for part in ("weight", "bias"))
        self._heads = [
            (weight.T.contiguous().to(device), bias.to(device))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        self._local = local or threading.local()

    def predict(self, history: Tensor, out: Tensor) -> None:
        """Predict one step for at most one block.

        Args:
            history: ``[S, rows]`` float32 on the CPU or the kernel's device, most-forgotten
                first, θ0 last; rows ≤ ``block_rows``.
            out: ``[rows]`` float32, likewise, receives θ̂(−1).
        """
        work = self._workspace()
        rows = history.shape[1]
        if rows == self.block_rows:
            work.values.copy_(history)
        else:
            work.values[:, :rows].copy_(history)
            work.values[:, rows:].zero_()
        if self.preparation is Preparation.RAW:
            torch.sub(work.later, work.earlier, out=work.differences)
            self._change(work)
            change, origin = work.flat, work.newest
        else:
            _prepare(work)
            self._change(work)
            change, origin = work.flat.mul_(work.spread), work.origin
        for factor in work.factors:
            change.add_(factor.mul_(origin))
        change.add_(origin)
        out.copy_(change if rows == self.block_rows else change[:rows])

    @property
    def thread_bytes(self) -> int:
        """Main memory, in bytes, that each predicting thread needs for itself."""
        if self.device.type != "cpu":
            return 0
        meta = torch.device("meta")
        return _Workspace(self.block_rows, self.checkpoints, self._factor, meta).nbytes

    def _workspace(self) -> _Workspace:
        work: _Workspace | None = getattr(self._local, "workspace", None)
        if work is None:
            work = _Workspace(self.block_rows, self.checkpoints, self._factor, self.device)
            self._local.workspace = work
        return work

    def _change(self, work: _Workspace) -> None:
        """Compute the head's outputs from a prepared window and its differences."""
        torch.mm(self._squeeze, work.window, out=work.squeezed).relu_()
        x, y = work.x, work.y
        for stream, (values, squeezed, features) in zip(self._streams, work.inputs, strict=True):
            torch.mm(values, stream.input, out=x)
            torch.mm(squeezed, stream.rate, out=y).mul_(x).exp_()
            # x is free from here on; two buffers stay in the cache, three would not.
            torch.mm(squeezed, stream.amplitude, out=x)
            y.mul_(x)
            # The second product is more than half of the work.
            torch.mm(squeezed, stream.linear, out=features).addmm_(y, stream.output)
        torch.nn.functional.leaky_relu_(work.features, NEGATIVE_SLOPE)
        for (weight, bias), output in zip(self._heads, work.outputs, strict=True):
            torch.addmm(bias, work.features, weight, out=output).tanh_()


def _join_squeeze(window: _Stream, difference: _Stream) -> Tensor:
    """Both streams' squeeze as one product: ``[17, 2S]`` float32, the middle row giving 1."""
    S = len(difference.squeeze)
    joined = torch.zeros(2 * SQUEEZED + 1, 2 * S, dtype=torch.float64)
    joined[:SQUEEZED, : S + 1] = window.squeeze.T
    joined[SQUEEZED, S] = 1
    joined[SQUEEZED + 1 :, S:] = difference.squeeze.T
    return joined.float()


def _prepare(work: _Workspace) -> None:
    """As :func:`~know_cli.known.module.prepare` does for ``SPREAD``, in place."""
    work.origin.copy_(work.newest)
    work.values.sub_(work.origin)
    torch.abs(work.earlier, out=work.magnitude)
    torch.amax(work.magnitude, dim=0, out=work.spread)
    # A spread of 0 would give 0/0; dividing by infinity gives the 0 that is meant.
    torch.threshold_(work.divisor.copy_(work.spread), 0.0, torch.inf)
    work.values.div_(work.divisor)
    torch.sub(work.later, work.earlier, out=work.differences)
    torch.div(work.origin, work.divisor, out=work.newest)
    if work.newest_array is None:
        work.newest.asinh_()
    else:
        # Torch computes one value at a time, which takes eight times as long as numpy.
        np.arcsinh(work.newest_array, out=work.newest_array)


class TorchSteps:
    """The torch kernel as a :class:`DeviceKernel`.

    Args:
        kernel: predicts one step. No other lane may use it, since both would share its workspace.
        steps: how many are predicted.
    """

    def __init__(self, kernel: Kernel, steps: int) -> None:
        self._kernel = kernel
        rows = kernel.checkpoints + steps - 1
        self._windows = torch.empty(rows, kernel.block_rows, device=kernel.device)

    def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
        """Predict all steps; see :class:`DeviceKernel`."""
        size, rows = history.shape
        windows = self._windows[:, :rows]
        windows[:size].copy_(history)
        for step, answer in enumerate(out):
            self._kernel.predict(windows[step : step + size], answer)
            if step + 1 < len(out):
                finite = torch.isfinite(answer)
                windows[size + step].copy_(torch.where(finite, answer, history[-1]))
