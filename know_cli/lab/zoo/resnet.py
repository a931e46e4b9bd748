"""ResNet for small images: three stages of basic blocks (He et al., arXiv 1512.03385)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    UNIT_CHOICES,
    classifier,
    convolution,
    damp,
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

_STAGES = 3


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, activation: str, norm: str, bias: bool
    ) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride, bias=bias)
        self.bn1 = normalisation(norm, outputs)
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = convolution(outputs, outputs, 3, bias=bias)
        self.bn2 = normalisation(norm, outputs)
        self.act2 = ACTIVATIONS[activation]()
        self.downsample = (
            in_order(convolution(inputs, outputs, 1, stride), normalisation(norm, outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, inputs, h, w]`` to ``[n, outputs, ⌈h / stride⌉, ⌈w / stride⌉]``."""
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        result: Tensor = self.act2(self.downsample(x) + branch)
        return result


def _choices(inputs: Inputs) -> Choices:
    return {
        "width": (12, 16, 20),
        "blocks": (1, 1, 2, 2, 3),
        **stem_choices(inputs),
        "activation": ("relu", "relu", "gelu", "silu"),
        "norm": ("batch", "batch", "none", "group"),
        **UNIT_CHOICES,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    width: int,
    blocks: int,
    stem_stride: int,
    stem_pool: bool,
    activation: str,
    norm: str,
    bias: bool,
    pooling: str,
    dropout: float,
    initial: str,
) -> nn.Module:
    """A stem, three stages of ``blocks`` basic blocks with doubling channels, and a head."""
    stem, pool = stem_layers(inputs.shape[0], width, stem_stride, pool=stem_pool, bias=bias)
    layers: dict[str, nn.Module] = {
        "conv1": stem,
        "bn1": normalisation(norm, width),
        "act1": ACTIVATIONS[activation](),
        "maxpool": pool,
    }
    last_layers, channels = [], width
    strides = [1, *halvings(math.ceil(inputs.side / stem_stride), _STAGES - 1)]
    for stage, first_stride in enumerate(strides, start=1):
        outputs = width * 2 ** (stage - 1)
        stack = []
        for stride in strides_in_stage(first_stride, blocks):
            block = BasicBlock(
                channels, outputs, stride, activation=activation, norm=norm, bias=bias
            )
            last_layers.append(block.conv2)
            stack.append(block)
            channels = outputs
        layers[f"layer{stage}"] = nn.Sequential(*stack)
    model = named(**layers, **classifier(pooling, channels, dropout, classes))
    initialise(model, initial)
    if norm == "none":
        damp(last_layers)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
