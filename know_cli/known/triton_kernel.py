"""KNOWN as one Triton kernel: all steps of a block in one launch, the windows in registers.

Needs Triton, which comes with CUDA builds of torch; only :mod:`know_cli.known.devices` imports
this module. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, the same
code runs in Triton's interpreter, on the CPU.

Triton's matrix products need an inner dimension of at least 16. So a window is the first S of a
tile's 16 columns, its differences are the first S − 1 columns of another tile, and the remaining
columns are zero. Windows do not move from step to step: the prediction replaces the column of the
oldest value, and the rows of the input layers' weights are loaded in the order of the columns.

Each matrix product is a sum of three TF32 products, which is about as exact as float32.
``tl.dot`` does the same with ``input_precision="tf32x3"``, but it splits the weights again at every
step and checks for infinities: compiled for sm_90, the program has 3960 instructions that way and
2984 this way. Where an intermediate value overflows, the result is NaN more often than with torch's
kernel. log2(e) is folded into the rates' weights, so the exponential is the hardware's exp2.
Triton does not offer tanh and asinh on every target, so they are written out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from know_cli.engine.plan import Block
from know_cli.known.folding import Affine, fold
from know_cli.known.module import FEATURES, HIDDEN, NEGATIVE_SLOPE, has_factor
from know_cli.known.preparation import Preparation

#: Rows per program.
BLOCK = 64
#: Rows per program on the fifth generation of tensor cores. With 32, products use the second
#: generation's instructions; Triton 3.7.1 compiles 64 to nothing but a trap.
SMALL_BLOCK = 32
# Major compute capabilities.
_FIFTH_GENERATION = range(10, 12)
_FIRST_WITH_TF32 = 8
#: How a program is compiled. Loads of weights are not pipelined, since three stages take 98 kB of
#: shared memory. Fused multiply-add is set explicitly because Triton's default is going to change.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

# Columns of a tile, and so the most checkpoints that a window may have.
_COLUMNS = tl.constexpr(16)
_HIDDEN = tl.constexpr(HIDDEN)
_FEATURES = tl.constexpr(FEATURES)
_SLOPE = tl.constexpr(NEGATIVE_SLOPE)
_INFINITY = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2_E = 1.4426950408889634


@triton.jit
def _dot(values: tl.tensor, at: tl.tensor, SMALL: tl.constexpr, sums: tl.tensor) -> tl.tensor:
    """``[rows, inputs]`` values · ``[inputs, outputs]`` weights at pointers + ``[rows, outputs]``.

    Values and weights are each split into a TF32 number and a remainder. All products are summed
    but that of the two remainders ("3xTF32", https://arxiv.org/abs/2203.03341), small ones first.
    """
    # Round to the nearest TF32 number, whose last 13 bits are 0.
    bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    big = bits.to(tl.float32, bitcast=True)
    big_weight, small_weight = tl.load(at), tl.load(at + SMALL)
    sums = tl.dot(values - big, big_weight, sums, input_precision="tf32")
    sums = tl.dot(big, small_weight, sums, input_precision="tf32")
    return tl.dot(big, big_weight, sums, input_precision="tf32")


@triton.jit
def _whole(at: tl.tensor, SMALL: tl.constexpr) -> tl.tensor:
    """Weights at pointers, as float32."""
    return tl.load(at) + tl.load(at + SMALL)


@triton.jit
def _affine(
    values: tl.tensor, at: tl.tensor, row: tl.tensor, OUTPUTS: tl.constexpr, SMALL: tl.constexpr
) -> tl.tensor:
    """``[rows, 16]`` → ``[rows, OUTPUTS]``: the layer at a pointer, weights first, then the bias.

    ``row``: ``[16]``, the row of the weights for each column.
    """
    column = tl.arange(0, OUTPUTS)
    bias = _whole(at + _COLUMNS * OUTPUTS + column, SMALL)
    sums = tl.broadcast_to(bias[None, :], (values.shape[0], OUTPUTS))
    return _dot(values, at + row[:, None] * OUTPUTS + column[None, :], SMALL, sums)


@triton.jit
def _stream(values: tl.tensor, at: tl.tensor, row: tl.tensor, SMALL: tl.constexpr) -> tl.tensor:
    """``[rows, 16]`` → ``[rows]``: a stream, and its half of the head; see :func:`_pack`."""
    column = tl.arange(0, _COLUMNS)
    feature = tl.arange(0, _FEATURES)
    x = _affine(values, at, row, _HIDDEN, SMALL)
    at += (_COLUMNS + 1) * _HIDDEN
    z = _affine(values, at, row, _COLUMNS, SMALL)
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at += (_COLUMNS + 1) * _COLUMNS
    y = tl.exp2(_affine(z, at, column, _HIDDEN, SMALL) * x)
    at += (_COLUMNS + 1) * _HIDDEN
    y *= _affine(z, at, column, _HIDDEN, SMALL)
    at += (_COLUMNS + 1) * _HIDDEN
    h = _affine(z, at, column, _FEATURES, SMALL)
    at += (_COLUMNS + 1) * _FEATURES
    output = at + tl.arange(0, _HIDDEN)[:, None] * _FEATURES + feature[None, :]
    h = _dot(y, output, SMALL, h)
    at += _HIDDEN * _FEATURES
    h = tl.where(h > 0, h, _SLOPE * h)
    return tl.sum(h * _whole(at + feature, SMALL)[None, :], axis=1)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """As the Cephes library's ``tanhf``, within 2 units in the last place."""
    size, square = tl.abs(x), x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def _asinh(x: tl.tensor) -> tl.tensor:
    size = tl.abs(x)
    square = size * size
    # asinh(x) = log(1 + t); the quotient makes up for the rounding of 1 + t, as in theorem 4 of
    # "What every computer scientist should know about floating-point arithmetic" (Goldberg, 1991).
    t = size + square / (1 + tl.sqrt(1 + square))
    sum_ = 1 + t
    small = tl.where(sum_ == 1, t, tl.log(sum_) * (t / (sum_ - 1)))
    # Above that, the square may overflow, and adding 1 changes nothing.
    result = tl.where(size < 1e9, small, tl.log(size) + _LN2)
    return tl.where(x < 0, -result, result)


@triton.jit(do_not_specialize=["rows", "steps"])
def _predict(
    history: tl.tensor,
    out: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    steps: tl.tensor,
    history_stride: tl.tensor,
    out_stride: tl.tensor,
    S: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
    SMALL: tl.constexpr,
) -> None:
    """See :class:`TritonKernel`.

    ``STREAM`` is the offset of the second stream's weights, ``SMALL`` that of all remainders.
    """
    column = tl.arange(0, _COLUMNS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = history + column[None, :] * history_stride + row[:, None]
    values = tl.load(at, mask=inside[:, None] & (column < S)[None, :], other=0.0).to(tl.float32)
    later = inside[:, None] & (column < S - 1)[None, :]
    differences = tl.load(at + history_stride, mask=later, other=0.0).to(tl.float32)
    differences = tl.where(later, differences - values, 0.0)
    newest = tl.load(history + (S - 1) * history_stride + row, mask=inside, other=0.0)
    newest = newest.to(tl.float32)
    first = newest
    for step in range(steps):
        # The position in the window of each column's value; unused columns stay at the end.
        position = tl.where(column < S, (column + S - step % S) % S, column)
        gap = tl.where(column < S - 1, (column + (S - 1) - step % (S - 1)) % (S - 1), column)
        if SPREAD:
            centred = tl.where((column < S)[None, :], values - newest[:, None], 0.0)
            spread = tl.max(tl.abs(centred), axis=1)
            # A spread of 0 would give 0/0; dividing by infinity gives the 0 that is meant.
            divisor = tl.where(spread > 0, spread, _INFINITY)
            size = _asinh(newest / divisor)
            seen = tl.where((position == S - 1)[None, :], size[:, None], centred / divisor[:, None])
            moved = differences / divisor[:, None]
        else:
            seen, moved = values, differences
        head = _stream(seen, weights, position, SMALL)
        head += _stream(moved, weights + STREAM, gap, SMALL)
        change = _tanh(head + _whole(weights + 2 * STREAM, SMALL))
        if SPREAD:
            change *= spread
        answer = newest + change
        tl.store(out + step * out_stride + row, answer, mask=inside)
        # NaN would spread to all later steps, so they continue from the recorded θ0.
        answer = tl.where(tl.abs(answer) < _INFINITY, answer, first)
        # The prediction replaces the oldest value, and the newest difference the oldest one.
        values = tl.where((position == 0)[None, :], answer[:, None], values)
        differences = tl.where((gap == 0)[None, :], (answer - newest)[:, None], differences)
        newest = answer


class TritonKernel:
    """One hyper-model on one CUDA device, or on the CPU in Triton's interpreter.

    Args:
        state: state dict of a :class:`~know_cli.known.module.Known`, float32.
        checkpoints: S, at most 16.
        preparation: what is done to a window first.
        device: where it runs.

    Attributes:
        constants: what the kernel is compiled for.

    Raises:
        RuntimeError: the CUDA device has no tensor cores with TF32, or Triton does not use them;
            or the hyper-model has a factor on θ0, which only torch's kernel computes.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        checkpoints: int,
        preparation: Preparation,
        device: torch.device,
    ) -> None:
        if has_factor(state):
            raise RuntimeError("it has no second output")
        head = state["head.weight"][0].double()
        streams = [_pack(state, "window", head[:FEATURES])]
        streams.append(_pack(state, "difference", head[FEATURES:]))
        # Padded to a multiple of 16, so that all parts can be loaded four numbers at a time.
        packed = torch.cat([*streams, state["head.bias"].double(), head.new_zeros(15)])
        self.constants = {
            "S": checkpoints,
            "SPREAD": preparation is Preparation.SPREAD,
            "BLOCK": block_rows(device),
            "STREAM": len(streams[0]),
            "SMALL": len(packed),
        }
        big = _tf32(packed.float())
        self._weights = torch.cat([big, (packed - big).float()]).to(device)
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.compile()

    def compile(self) -> str:
        """Compile for float32 and the current device, and check the assembly.

        Returns:
            The assembly in NVIDIA's PTX.

        Raises:
            RuntimeError: it has no matrix products on tensor cores.
        """
        S, columns = self.constants["S"], _COLUMNS.value
        history, out = (self._weights.new_empty(rows, columns) for rows in (S, 1))
        compiled = _predict.warmup(*self._arguments(history, out), grid=(1,), **self._choices)
        assembly = str(compiled.asm["ptx"])
        if "mma" not in assembly:
            raise RuntimeError("Triton compiles it without tensor cores")
        return assembly

    def predict(self, block: Block, history: Tensor, out: Tensor) -> None:
        """Predict all steps, in the current stream of the device, which must be the current one.

        Where a prediction is not finite, the steps after it go on from θ0.

        Args:
            block: tells which tensors the rows belong to; KNOWN does not use it.
            history: ``[S, rows]`` on the device, of any float dtype, most-forgotten first, θ0
                last; contiguous along rows. At most 2³¹ − 1 elements.
            out: ``[steps, rows]`` float32 on the device, likewise; receives θ̂(−1), θ̂(−2), …
        """
        programs = triton.cdiv(history.shape[1], self.constants["BLOCK"])
        _predict[(programs,)](*self._arguments(history, out), **self._choices)

    def _arguments(self, history: Tensor, out: Tensor) -> tuple[Tensor | int, ...]:
        rows, steps = history.shape[1], len(out)
        return history, out, self._weights, rows, steps, history.stride(0), out.stride(0)

    @property
    def _choices(self) -> dict[str, int]:
        return {**self.constants, **OPTIONS}


def block_rows(device: torch.device) -> int:
    """Rows of one program on a device.

    Raises:
        RuntimeError: it is a CUDA device without TF32.
    """
    if device.type != "cuda":
        return BLOCK
    major, _ = torch.cuda.get_device_capability(device)
    if major < _FIRST_WITH_TF32:
        raise RuntimeError("its tensor cores have no TF32")
    return SMALL_BLOCK if major in _FIFTH_GENERATION else BLOCK


def _pack(state: Mapping[str, Tensor], name: str, head: Tensor) -> Tensor:
    """A stream's layers and its half of the head, ``[32]``, in the order of :func:`_stream`.

    Weights are ``[inputs, outputs]``, zero-padded to 16 inputs and, for squeeze, to 16 outputs.

    Returns:
        One dimension, float64.
    """
    folded = fold(state, name)
    rate = Affine(*(part * _LOG2_E for part in folded.rate))
    parts = [
        _padded(folded.input, HIDDEN),
        _padded(folded.squeeze, _COLUMNS.value),
        _padded(rate, HIDDEN),
        _padded(folded.amplitude, HIDDEN),
        _padded(folded.linear, FEATURES),
        folded.output.T,
    ]
    return torch.cat([*(part.reshape(-1) for part in parts), head])


def _tf32(values: Tensor) -> Tensor:
    """Round to TF32, whose significand has 10 bits after the point; returned as float32."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _padded(layer: Affine, outputs: int) -> Tensor:
    """``[17, outputs]`` float64: 16 rows of weights, and the bias."""
    padded = layer.weight.new_zeros(_COLUMNS.value + 1, outputs)
    size, inputs = layer.weight.shape
    padded[:inputs, :size] = layer.weight.T
    padded[-1, :size] = layer.bias
    return padded
