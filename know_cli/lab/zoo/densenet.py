"""DenseNet: every layer reads all layers before it (Huang et al., arXiv 1608.06993)."""

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
    initialise,
    named,
    normalisation,
    stem_choices,
    stem_layers,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs


class DenseLayer(nn.Module):
    """Normalisation, activation and convolution, once or (bottleneck) twice; appends channels."""

    def __init__(
        self, inputs: int, growth: int, bottleneck: int, *, activation: str, norm: str, bias: bool
    ) -> None:
        super().__init__()
        self.norm1 = normalisation(norm, inputs)
        self.act1 = ACTIVATIONS[activation]()
        self.norm2: nn.Module = nn.Identity()
        self.act2: nn.Module = nn.Identity()
        self.conv2: nn.Module = nn.Identity()
        if bottleneck:
            self.conv1 = convolution(inputs, bottleneck * growth, 1, bias=bias)
            self.norm2 = normalisation(norm, bottleneck * growth)
            self.act2 = ACTIVATIONS[activation]()
            self.conv2 = convolution(bottleneck * growth, growth, 3, bias=bias)
        else:
            self.conv1 = convolution(inputs, growth, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, inputs, h, w]`` to ``[n, inputs + growth, h, w]``."""
        new = self.conv1(self.act1(self.norm1(x)))
        return torch.cat((x, self.conv2(self.act2(self.norm2(new)))), 1)


def _choices(inputs: Inputs) -> Choices:
    return {
        "growth": (8, 12, 16),
        "depth": (2, 3, 4),
        "blocks": (2, 2, 3),
        **stem_choices(inputs),
        "bottleneck": (2, 0, 4),
        "activation": ("relu", "relu", "gelu"),
        "norm": ("batch", "batch", "none", "group"),
        **UNIT_CHOICES,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    growth: int,
    depth: int,
    blocks: int,
    stem_stride: int,
    stem_pool: bool,
    bottleneck: int,
    activation: str,
    norm: str,
    bias: bool,
    pooling: str,
    dropout: float,
    initial: str,
) -> nn.Module:
    """A stem, ``blocks`` of ``depth`` dense layers with halving transitions, and a head."""
    channels = 2 * growth
    strides = halvings(math.ceil(inputs.side / stem_stride), blocks - 1)
    stem, pool = stem_layers(inputs.shape[0], channels, stem_stride, pool=stem_pool, bias=bias)
    layers: dict[str, nn.Module] = {
        "conv0": stem,
        "norm0": normalisation(norm, channels),
        "act0": ACTIVATIONS[activation](),
        "pool0": pool,
    }
    for number in range(1, blocks + 1):
        block = nn.Sequential()
        for layer in range(1, depth + 1):
            block.add_module(
                f"denselayer{layer}",
                DenseLayer(
                    channels, growth, bottleneck, activation=activation, norm=norm, bias=bias
                ),
            )
            channels += growth
        layers[f"denseblock{number}"] = block
        if number < blocks:
            layers[f"transition{number}"] = named(
                norm=normalisation(norm, channels),
                act=ACTIVATIONS[activation](),
                conv=convolution(channels, channels // 2, 1, bias=bias),
                pool=nn.AvgPool2d(2, ceil_mode=True) if strides[number - 1] == 2 else nn.Identity(),
            )
            channels //= 2
    layers["norm5"] = normalisation(norm, channels)
    layers["act5"] = ACTIVATIONS[activation]()
    model = named(features=named(**layers), **classifier(pooling, channels, dropout, classes))
    initialise(model, initial)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
