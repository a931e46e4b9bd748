"""KNOWN for fixed blocks of rows, with the algebra folded and every buffer allocated once.

``x`` feeds only a linear layer and the exponential, so squeeze∘input collapses to S → 8 and
output∘linear to 8 → 32; log2(e) folds into the rate layer, so that exp becomes exp2. All
folding is done in float64 once. The last block is padded, so that every matrix product has the
same shape and a parameter's result does not depend on what else is in its batch.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from know_cli.hypermodel.known import (
    FEATURES,
    HIDDEN,
    NEGATIVE_SLOPE,
    SQUEEZED,
    Preparation,
    prepare,
)

#: Rows of a block on a CPU. Of 512, 1024, 2048 and 4096, two threads were fastest with 4096
#: (4.3 M parameters/s a step; 3.6, 2.2 and 1.6 with the smaller ones, which wait for the
#: interpreter between operations).
CPU_BLOCK_ROWS = 4096
#: Rows of a block on other devices, where a launch costs more than what a block holds.
DEVICE_BLOCK_ROWS = 1 << 17


class _Stream:
    """Folded weights of one stream, each [in, out] for row-major products."""

    def __init__(self, state: dict[str, Tensor], name: str, device: torch.device) -> None:
        def layer(which: str) -> tuple[Tensor, Tensor]:
            weight = state[f"{name}.{which}.weight"].double()
            return weight, state[f"{name}.{which}.bias"].double()

        def put(weight: Tensor) -> Tensor:
            return weight.float().contiguous().to(device)

        (w_in, b_in), (w_sq, b_sq), (w_lin, b_lin) = map(layer, ("input", "squeeze", "linear"))
        (w_amp, b_amp), (w_rate, b_rate), (w_out, b_out) = map(
            layer, ("amplitude", "rate", "output")
        )
        log2e = math.log2(math.e)
        self.input = put(w_in.T), put(b_in)
        self.squeeze = put((w_sq @ w_in).T), put(w_sq @ b_in + b_sq)
        self.amplitude = put(w_amp.T), put(b_amp)
        self.rate = put(w_rate.T * log2e), put(b_rate * log2e)
        self.linear = put((w_out @ w_lin).T), put(w_out @ b_lin + b_out)
        self.output = put(w_out.T)


class _Workspace:
    """Intermediate results of one block; one a thread."""

    def __init__(self, rows: int, checkpoints: int, device: torch.device) -> None:
        self.nbytes = 0

        def new(columns: int) -> Tensor:
            tensor = torch.empty(rows, columns, device=device)
            self.nbytes += tensor.nbytes
            return tensor

        self.window = new(checkpoints)
        self.difference = new(checkpoints - 1)
        self.x, self.amplitude, self.rate = new(HIDDEN), new(HIDDEN), new(HIDDEN)
        self.z = new(SQUEEZED)
        self.features = new(2 * FEATURES)
        self.change = new(1)


class Kernel:
    """One KNOWN, folded, on one device. Safe to call from several threads.

    Args:
        state: state dict of a :class:`~know_cli.hypermodel.known.Known`, float32.
        checkpoints: S.
        preparation: what is done to a window first.
        device: where it runs.
        local: holds the workspaces of threads; kernels for the same S and device may share it.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        checkpoints: int,
        preparation: Preparation,
        device: torch.device,
        local: threading.local | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self.preparation = preparation
        self.device = device
        self.block_rows = CPU_BLOCK_ROWS if device.type == "cpu" else DEVICE_BLOCK_ROWS
        self._window = _Stream(state, "window", device)
        self._difference = _Stream(state, "difference", device)
        self._head_weight = state["head.weight"].T.contiguous().to(device)
        self._head_bias = state["head.bias"].to(device)
        self._local = local or threading.local()

    def predict(self, history: Tensor, out: Tensor) -> None:
        """Predict one step for at most one block.

        Args:
            history: ``[S, rows]`` float32 on the CPU, most-forgotten first, θ0 last;
                rows ≤ ``block_rows``.
            out: ``[rows]`` float32 on the CPU, receives θ̂(−1).
        """
        work = self._workspace()
        rows = history.shape[1]
        work.window[:rows].copy_(history.T)
        work.window[rows:].zero_()
        newest = work.window[:, -1].clone()
        scale = None
        if self.preparation is Preparation.RAW:
            torch.sub(work.window[:, 1:], work.window[:, :-1], out=work.difference)
        else:
            values, scale = prepare(work.window, self.preparation)
            work.window.copy_(values)
            work.window[:, -1] = 0
            torch.sub(work.window[:, 1:], work.window[:, :-1], out=work.difference)
            work.window[:, -1] = values[:, -1]
        self._stream(self._window, work, work.window, work.features[:, :FEATURES])
        self._stream(self._difference, work, work.difference, work.features[:, FEATURES:])
        torch.addmm(self._head_bias, work.features, self._head_weight, out=work.change)
        change = work.change.squeeze(1).tanh_()
        if scale is not None:
            change.mul_(scale)
        out.copy_(newest.add_(change)[:rows])

    @property
    def thread_bytes(self) -> int:
        """Bytes of main memory that each thread that predicts needs for itself."""
        if self.device.type != "cpu":
            return 0
        # Beside the workspace, preparing a window and a stream's features make copies.
        copies = self.block_rows * (3 * self.checkpoints + FEATURES) * 4
        return _Workspace(self.block_rows, self.checkpoints, torch.device("meta")).nbytes + copies

    def _workspace(self) -> _Workspace:
        work: _Workspace | None = getattr(self._local, "workspace", None)
        if work is None:
            work = _Workspace(self.block_rows, self.checkpoints, self.device)
            self._local.workspace = work
        return work

    @staticmethod
    def _stream(stream: _Stream, work: _Workspace, values: Tensor, out: Tensor) -> None:
        torch.addmm(stream.input[1], values, stream.input[0], out=work.x)
        torch.addmm(stream.squeeze[1], values, stream.squeeze[0], out=work.z).relu_()
        torch.addmm(stream.amplitude[1], work.z, stream.amplitude[0], out=work.amplitude)
        torch.addmm(stream.rate[1], work.z, stream.rate[0], out=work.rate)
        work.rate.mul_(work.x).exp2_().mul_(work.amplitude)
        features = torch.addmm(stream.linear[1], work.z, stream.linear[0])
        features.addmm_(work.rate, stream.output)
        out.copy_(torch.nn.functional.leaky_relu_(features, NEGATIVE_SLOPE))
