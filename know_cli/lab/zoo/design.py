"""The description of a network of the zoo: its inputs and options, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from know_cli.errors import UsageError

Value = int | float | str | bool
Choices = Mapping[str, tuple[Value, ...]]

_DIMENSIONS = {"image": "channels, height, width", "text": "vocabulary, length"}
#: Below this, a network that halves its images twice would have nothing left to convolve.
SMALLEST_SIDE = 8


@dataclass(frozen=True)
class Inputs:
    """The inputs of a network.

    Attributes:
        kind: ``image`` (float32 ``[n, channels, height, width]``) or ``text`` (int64 tokens
            ``[n, length]`` from 0 to vocabulary − 1).
        shape: ``(channels, height, width)`` of an image, ``(vocabulary, length)`` of a text.

    Raises:
        UsageError: there is no such kind, or the shape does not fit it.
    """

    kind: Literal["image", "text"]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in _DIMENSIONS:
            raise UsageError(
                f"unknown kind of inputs {self.kind!r}; choose from {', '.join(_DIMENSIONS)}"
            )
        names = _DIMENSIONS[self.kind]
        if len(self.shape) != names.count(",") + 1 or not all(
            type(size) is int and size > 0 for size in self.shape
        ):
            raise UsageError(f"{self.kind} of shape {self.shape}: must be ({names})")
        if self.kind == "image" and self.side < SMALLEST_SIDE:
            raise UsageError(
                f"image of shape {self.shape}: sides of at least {SMALLEST_SIDE} pixels are needed"
            )

    @property
    def side(self) -> int:
        """The shorter side of an image in pixels."""
        return min(self.shape[1:])


@dataclass(frozen=True)
class Design:
    """A network without its weights, in plain JSON values.

    Attributes:
        architecture: a name in ``ARCHITECTURES``.
        inputs: of the network.
        classes: number of outputs, at least 2.
        options: of the architecture; one that is missing takes its first choice.

    Raises:
        UsageError: there are fewer than two classes.
    """

    architecture: str
    inputs: Inputs
    classes: int
    options: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UsageError(f"{self.classes} classes: a classifier needs at least 2")

    def to_json(self) -> dict[str, Any]:
        """The design as JSON values; the inverse of :meth:`from_json`."""
        return {
            "architecture": self.architecture,
            "inputs": {"kind": self.inputs.kind, "shape": list(self.inputs.shape)},
            "classes": self.classes,
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Design:
        """Read a design that :meth:`to_json` returned.

        Raises:
            UsageError: parts are missing or have the wrong type.
        """
        try:
            inputs = Inputs(content["inputs"]["kind"], tuple(content["inputs"]["shape"]))
            return cls(
                content["architecture"], inputs, content["classes"], dict(content["options"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a design ({error!r}): {content!r}") from error


@dataclass(frozen=True)
class Architecture:
    """An entry of the zoo.

    Attributes:
        kind: of the inputs that it takes.
        choices: maps inputs to the options of a design for them, with the values to draw from;
            a repeated value is drawn more often, and the first is the default.
        construct: makes the network from inputs, classes and every option by name, drawing its
            initial weights from torch's default generator.
    """

    kind: Literal["image", "text"]
    choices: Callable[[Inputs], Choices]
    construct: Callable[..., nn.Module]
