"""KNOWN's streams with consecutive linear layers joined, in float64, for the kernels to pack.

``x`` feeds only a linear layer and the exponential, so squeeze∘input collapses to S → 8 and
output∘linear to 8 → 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """A linear layer: ``[outputs, inputs]`` weight and ``[outputs]`` bias, both float64."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class FoldedStream:
    """One stream. It reads v; z = relu(squeeze(v)) and x = input(v).

    Its features before the leaky ReLU are linear(z) + output · (amplitude(z) · exp(rate(z) · x)).

    Attributes:
        input: values → 64.
        squeeze: values → 8.
        rate, amplitude: 8 → 64.
        linear: 8 → 32.
        output: ``[32, 64]`` float64; its bias is in ``linear``.
    """

    input: Affine
    squeeze: Affine
    rate: Affine
    amplitude: Affine
    linear: Affine
    output: Tensor


def fold(state: Mapping[str, Tensor], name: str) -> FoldedStream:
    """Join the layers of a stream.

    Args:
        state: state dict of a :class:`~know_cli.known.module.Known`.
        name: ``window`` or ``difference``.
    """

    def layer(which: str) -> Affine:
        weight, bias = (state[f"{name}.{which}.{part}"].double() for part in ("weight", "bias"))
        return Affine(weight, bias)

    inputs, output = layer("input"), layer("output")
    return FoldedStream(
        inputs,
        _after(layer("squeeze"), inputs),
        layer("rate"),
        layer("amplitude"),
        _after(output, layer("linear")),
        output.weight,
    )


def _after(second: Affine, first: Affine) -> Affine:
    return Affine(second.weight @ first.weight, second.weight @ first.bias + second.bias)
