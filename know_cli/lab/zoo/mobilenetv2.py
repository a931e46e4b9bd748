"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al., arXiv 1801.04381)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    HE,
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


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project without activation; a shortcut where shapes match."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expansion: int,
        kernel: int,
        *,
        activation: str,
        norm: str,
        bias: bool,
    ) -> None:
        super().__init__()
        self.has_shortcut = stride == 1 and inputs == outputs
        wide = inputs * expansion
        act = ACTIVATIONS[activation]
        parts: list[nn.Module] = []
        if expansion > 1:
            expand = convolution(inputs, wide, 1, bias=bias)
            parts.append(in_order(expand, normalisation(norm, wide), act()))
        depthwise = convolution(wide, wide, kernel, stride, groups=wide, bias=bias)
        parts.append(in_order(depthwise, normalisation(norm, wide), act()))
        self.last = len(parts)
        parts += [convolution(wide, outputs, 1, bias=bias), normalisation(norm, outputs)]
        self.conv = in_order(*parts)

    @property
    def projection(self) -> nn.Conv2d:
        """The projecting convolution, last of the branch."""
        layer = self.conv[self.last]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """From ``[n, inputs, h, w]`` to ``[n, outputs, ⌈h / stride⌉, ⌈w / stride⌉]``."""
        branch: Tensor = self.conv(x)
        return x + branch if self.has_shortcut else branch


def _choices(inputs: Inputs) -> Choices:
    return {
        "width": (8, 12, 16),
        "stages": (2, 3),
        "blocks": (1, 1, 2),
        "expansion": (2, 3, 4),
        "kernel": (3, 3, 5),
        **stem_choices(inputs),
        "activation": ("relu6", "relu6", "hardswish", "silu"),
        "norm": ("batch", "batch", "batch", "group", "none"),
        "bias": (False, False, True),
        "dropout": (0.0, 0.0, 0.2),
        "initial": HE,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    width: int,
    stages: int,
    blocks: int,
    expansion: int,
    kernel: int,
    stem_stride: int,
    stem_pool: bool,
    activation: str,
    norm: str,
    bias: bool,
    dropout: float,
    initial: str,
) -> nn.Module:
    """A stem, a block without expansion, halving stages of ``blocks``, a last convolution, a head.

    ``kernel`` is the size of the depthwise convolutions.
    """

    def active(layer: nn.Conv2d) -> tuple[nn.Module, nn.Module, nn.Module]:
        return layer, normalisation(norm, layer.out_channels), ACTIVATIONS[activation]()

    strides = halvings(math.ceil(inputs.side / stem_stride), stages)
    plan = [(width, 1, 1)]
    for stage, first_stride in enumerate(strides):
        outputs = 4 * round(width * 1.6 ** (stage + 1) / 4)
        plan += [(outputs, stride, expansion) for stride in strides_in_stage(first_stride, blocks)]
    channels = 2 * width
    stem, pool = stem_layers(inputs.shape[0], channels, stem_stride, pool=stem_pool, bias=bias)
    features: list[nn.Module] = [in_order(*active(stem), pool)]
    last_layers = []
    for outputs, stride, widening in plan:
        block = InvertedResidual(
            channels, outputs, stride, widening, kernel, activation=activation, norm=norm, bias=bias
        )
        if block.has_shortcut:
            last_layers.append(block.projection)
        features.append(block)
        channels = outputs
    features.append(in_order(*active(convolution(channels, 4 * channels, 1, bias=bias))))
    model = named(
        features=nn.Sequential(*features),
        **classifier("average", 4 * channels, dropout, classes),
    )
    initialise(model, initial)
    if norm == "none":
        damp(last_layers)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
