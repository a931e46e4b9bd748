"""ShuffleNet V2: half of the channels pass each unit untouched (Ma et al., arXiv 1807.11164)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    UNIT_CHOICES,
    classifier,
    convolution,
    halvings,
    in_order,
    initialise,
    named,
    normalisation,
    stem_choices,
    stem_layers,
    strides_in_stage,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs


def shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels of ``[n, channels, h, w]``."""
    n, channels, *size = x.shape
    return x.view(n, 2, channels // 2, *size).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Pointwise, depthwise and pointwise convolutions on half of the channels, then a shuffle.

    Where the number of channels changes, both branches read all of them.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, activation: str, norm: str, bias: bool
    ) -> None:
        super().__init__()
        self.splits = inputs == outputs
        half = outputs // 2
        act = ACTIVATIONS[activation]
        self.branch1 = in_order()
        if not self.splits:
            self.branch1 = in_order(
                convolution(inputs, inputs, 3, stride, groups=inputs, bias=bias),
                normalisation(norm, inputs),
                convolution(inputs, half, 1, bias=bias),
                normalisation(norm, half),
                act(),
            )
        self.branch2 = in_order(
            convolution(half if self.splits else inputs, half, 1, bias=bias),
            normalisation(norm, half),
            act(),
            convolution(half, half, 3, stride, groups=half, bias=bias),
            normalisation(norm, half),
            convolution(half, half, 1, bias=bias),
            normalisation(norm, half),
            act(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, inputs, h, w]`` to ``[n, outputs, ⌈h / stride⌉, ⌈w / stride⌉]``."""
        left, right = x.chunk(2, 1) if self.splits else (x, x)
        return shuffle(torch.cat((self.branch1(left), self.branch2(right)), 1))


def _choices(inputs: Inputs) -> Choices:
    return {
        "width": (16, 24, 32),
        "stages": (2, 3),
        "units": (1, 2, 3),
        **stem_choices(inputs),
        "activation": ("relu", "relu", "hardswish"),
        "norm": ("batch", "batch", "group", "none"),
        **UNIT_CHOICES,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    width: int,
    stages: int,
    units: int,
    stem_stride: int,
    stem_pool: bool,
    activation: str,
    norm: str,
    bias: bool,
    pooling: str,
    dropout: float,
    initial: str,
) -> nn.Module:
    """A stem, stages of ``units`` shuffle units with doubling channels, conv5, and a head."""
    channels = width // 2
    stem, pool = stem_layers(inputs.shape[0], channels, stem_stride, pool=stem_pool, bias=bias)
    layers: dict[str, nn.Module] = {
        "conv1": in_order(stem, normalisation(norm, channels), ACTIVATIONS[activation]()),
        "maxpool": pool,
    }
    outputs = width
    strides = halvings(math.ceil(inputs.side / stem_stride), stages)
    for stage, first_stride in enumerate(strides, start=2):
        stack = []
        for stride in strides_in_stage(first_stride, units):
            stack.append(
                ShuffleUnit(channels, outputs, stride, activation=activation, norm=norm, bias=bias)
            )
            channels = outputs
        layers[f"stage{stage}"] = nn.Sequential(*stack)
        outputs *= 2
    layers["conv5"] = in_order(
        convolution(channels, 2 * channels, 1, bias=bias),
        normalisation(norm, 2 * channels),
        ACTIVATIONS[activation](),
    )
    model = named(**layers, **classifier(pooling, 2 * channels, dropout, classes))
    initialise(model, initial)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
