"""A multilayer perceptron on the pixels of an image."""

from __future__ import annotations

import math

from torch import nn

from know_cli.errors import UsageError
from know_cli.lab.zoo import blocks
from know_cli.lab.zoo.blocks import ACTIVATIONS, HE, initialise, named
from know_cli.lab.zoo.design import Architecture, Choices, Inputs

_LARGEST_LAYER = 2_000_000


def _choices(inputs: Inputs) -> Choices:
    affordable = _LARGEST_LAYER // math.prod(inputs.shape)
    widths = tuple(width for width in (64, 128, 256, 384) if width <= affordable)
    if not widths:
        raise UsageError(f"image of shape {inputs.shape}: too large for an mlp of the zoo")
    return {
        "width": widths,
        "layers": (2, 3, 4),
        "taper": (False, True),
        "activation": ("relu", "gelu", "silu"),
        "norm": ("none", "none", "batch", "layer"),
        "bias": (True, True, True, False),
        "dropout": (0.0, 0.0, 0.2, 0.4),
        "initial": HE,
    }


def _construct(
    inputs: Inputs,
    classes: int,
    *,
    width: int,
    layers: int,
    taper: bool,
    activation: str,
    norm: str,
    bias: bool,
    dropout: float,
    initial: str,
) -> nn.Module:
    """``layers`` counts the head; ``taper`` halves the width from layer to layer."""
    parts: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    features = math.prod(inputs.shape)
    for number in range(1, layers):
        outputs = width // 2 ** (number - 1) if taper else width
        parts[f"fc{number}"] = nn.Linear(features, outputs, bias=bias)
        if norm == "batch":
            parts[f"bn{number}"] = nn.BatchNorm1d(outputs)
        elif norm == "layer":
            parts[f"ln{number}"] = nn.LayerNorm(outputs)
        parts[f"{activation}{number}"] = ACTIVATIONS[activation]()
        parts[f"dropout{number}"] = blocks.dropout(dropout)
        features = outputs
    model = named(**parts, head=nn.Linear(features, classes))
    initialise(model, initial)
    return model


ARCHITECTURE = Architecture("image", _choices, _construct)
