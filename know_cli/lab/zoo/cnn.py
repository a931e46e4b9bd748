"""A plain convolutional network: 2 to 4 convolutions, each with its pooling, and a head."""

from __future__ import annotations

from torch import nn

from know_cli.lab.zoo import blocks
from know_cli.lab.zoo.blocks import (
    ACTIVATIONS,
    HE,
    convolution,
    global_pooling,
    initialise,
    named,
    normalisation,
)
from know_cli.lab.zoo.design import Architecture, Choices, Inputs

_WIDEST = 128
_PREFIXES = {"batch": "bn", "group": "gn", "none": "none"}


def _choices(inputs: Inputs) -> Choices:
    return {
        "width": (8, 16, 24, 32) if inputs.side >= 16 else (16, 24, 32),
        "depth": (2, 3, 4),
        "kernel": (3, 3, 5),
        "stem_stride": (1, 2) if inputs.side >= 16 else (1,),
        "activation": ("relu", "gelu", "silu"),
        "norm": ("batch", "none", "none", "group"),
        "bias": (True, False),
        "pooling": ("maximum", "average", "stride"),
        "hidden": (0, 64, 128),
        "dropout": (0.0, 0.0, 0.2, 0.4),
        "initial": HE,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    width: int,
    depth: int,
    kernel: int,
    stem_stride: int,
    activation: str,
    norm: str,
    bias: bool,
    pooling: str,
    hidden: int,
    dropout: float,
    initial: str,
) -> nn.Module:
    """Convolutions that double the channels and halve the image; ``hidden`` 0 pools globally."""
    channels, height, around = inputs.shape
    layers: dict[str, nn.Module] = {}
    for number in range(1, depth + 1):
        outputs = min(width * 2 ** (number - 1), _WIDEST)
        stride = stem_stride if number == 1 else 1
        halved = min(height, around) // stride >= 4
        if halved and pooling == "stride":
            stride *= 2
        layers[f"conv{number}"] = convolution(
            channels, outputs, kernel if number <= 2 else 3, stride, bias=bias
        )
        layers[f"{_PREFIXES[norm]}{number}"] = normalisation(norm, outputs)
        layers[f"{activation}{number}"] = ACTIVATIONS[activation]()
        height, around = -(-height // stride), -(-around // stride)
        if halved and pooling != "stride":
            layers[f"pool{number}"] = nn.MaxPool2d(2) if pooling == "maximum" else nn.AvgPool2d(2)
            height, around = height // 2, around // 2
        channels = outputs
    if hidden:
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(channels * height * around, hidden)
        layers[f"{activation}{depth + 1}"] = ACTIVATIONS[activation]()
        channels = hidden
    else:
        layers["pool"] = global_pooling("maximum" if pooling == "maximum" else "average")
    layers["dropout"] = blocks.dropout(dropout)
    layers["head"] = nn.Linear(channels, classes)
    model = named(**layers)
    initialise(model, initial)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
