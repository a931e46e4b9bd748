"""All architectures by name, and networks built from designs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from know_cli.errors import UsageError
from know_cli.lab.zoo import (
    cnn,
    densenet,
    mlp,
    mobilenetv2,
    pyramid,
    resnet,
    shufflenet,
    text,
    vit,
)
from know_cli.lab.zoo.design import Architecture, Choices, Design, Inputs, Value

ARCHITECTURES: dict[str, Architecture] = {
    "cnn": cnn.ARCHITECTURE,
    "resnet": resnet.ARCHITECTURE,
    "densenet": densenet.ARCHITECTURE,
    "shufflenet": shufflenet.ARCHITECTURE,
    "mobilenetv2": mobilenetv2.ARCHITECTURE,
    "vit": vit.ARCHITECTURE,
    "pyramid": pyramid.ARCHITECTURE,
    "mlp": mlp.ARCHITECTURE,
    "text": text.ARCHITECTURE,
}


def random_design(
    architecture: str, inputs: Inputs, classes: int, generator: np.random.Generator
) -> Design:
    """Draw every option of an architecture from its choices.

    Args:
        architecture: a name in :data:`ARCHITECTURES`.
        inputs: of the network.
        classes: number of outputs.
        generator: drawn from once per option.

    Raises:
        UsageError: there is no such architecture, or it does not take such inputs.
    """
    choices = _find(architecture, inputs).choices(inputs)
    options = {name: values[generator.integers(len(values))] for name, values in choices.items()}
    return Design(architecture, inputs, classes, options)


def build(design: Design, seed: int) -> nn.Module:
    """Build a freshly initialised network in training mode; its last layer is called ``head``.

    It maps images ``[n, channels, height, width]`` float32 or tokens ``[n, length]`` int64 to
    logits ``[n, classes]`` float32. An ``mlp`` with ``norm`` ``batch`` cannot be trained on a
    batch of one.

    Args:
        design: of the network; missing options take their first choice.
        seed: of the initial weights. The global random state is not changed.

    Raises:
        UsageError: there is no such architecture or option, the architecture does not take such
            inputs, or an option cannot have its value.
    """
    entry = _find(design.architecture, design.inputs)
    options = _complete(design, entry.choices(design.inputs))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return entry.construct(design.inputs, design.classes, **options)


def _find(architecture: str, inputs: Inputs) -> Architecture:
    entry = ARCHITECTURES.get(architecture)
    if entry is None:
        raise UsageError(
            f"unknown architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}"
        )
    if entry.kind != inputs.kind:
        raise UsageError(f"architecture {architecture} takes {entry.kind}, not {inputs.kind}")
    return entry


def _complete(design: Design, choices: Choices) -> dict[str, Value]:
    """Every option of a design, checked, with defaults for missing ones."""
    for name in design.options:
        if name not in choices:
            known = ", ".join(choices)
            raise UsageError(f"option {name!r}: {design.architecture} has only {known}")
    return {
        name: _checked(name, design.options.get(name, values[0]), values)
        for name, values in choices.items()
    }


def _checked(name: str, value: Value, values: tuple[Value, ...]) -> Value:
    # In Python True equals 1, and JSON may turn 0.0 into 0.
    alike = type(value) is type(values[0]) or {type(value), type(values[0])} == {int, float}
    if not alike or value not in values:
        known = ", ".join(map(str, dict.fromkeys(values)))
        raise UsageError(f"option {name}={value!r}: must be one of {known}")
    return values[values.index(value)]
