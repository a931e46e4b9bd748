"""A method with its options in one word of a command line: ``METHOD,option=value,steps=2``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from know_cli.engine.settings import MAX_STEPS
from know_cli.errors import UsageError, quoted
from know_cli.methods.registry import find_method, parse_options

_STEPS, _WEIGHTS = "steps", "weights"
_UNSAFE = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Spelled:
    """A method with its options, as ``know predict`` and ``know choose`` take them.

    Attributes:
        text: as on the command line: ``METHOD,option=value,steps=2``.
        method: its method.
        options: of the method, as text.
        steps: how many are predicted; None where the text does not say.
        weights: bundle of a method that reads one; None is its default.
    """

    text: str
    method: str
    options: tuple[str, ...] = ()
    steps: int | None = None
    weights: str | None = None

    @property
    def name(self) -> str:
        """Its text without what a file's name should not have.

        >>> Spelled("shrink,lambda=0.9", "shrink").name
        'shrink-lambda-0.9'
        """
        return _UNSAFE.sub("-", self.text).strip("-")

    def request(self) -> dict[str, Any]:
        """Its part of a request's keyword arguments, without checkpoints, output and settings.

        Raises:
            UsageError: there is no such method or option, or a value that cannot be.
        """
        found: dict[str, Any] = {
            "method": self.method,
            "options": parse_options(find_method(self.method), self.options),
        }
        if self.weights is not None:
            found["weights"] = self.weights
        return found


def parse_spelled(text: str, flag: str) -> Spelled:
    """Read ``METHOD,option=value,steps=2``.

    >>> parse_spelled("shrink,lambda=0.9,steps=2", "--method").steps
    2

    Args:
        text: to read.
        flag: of the command line, for messages.

    Raises:
        UsageError: there is no such method or option, or a value that cannot be.
    """
    method, *rest = text.split(",")
    options: list[str] = []
    steps, weights = None, None
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(
                f"{flag} {text}: {quoted(part)} has no value; write METHOD,option=value,steps=2"
            )
        if name == _STEPS:
            try:
                steps = int(value)
            except ValueError:
                raise UsageError(f"{flag} {text}: steps={value} is not a number") from None
            if not 1 <= steps <= MAX_STEPS:
                raise UsageError(
                    f"{flag} {text}: steps={value} is not in the range 1 to {MAX_STEPS}"
                )
        elif name == _WEIGHTS:
            weights = value
        else:
            options.append(part)
    spelled = Spelled(text, method, tuple(options), steps, weights)
    try:
        spelled.request()
    except UsageError as error:
        if not rest and flag == "--method":  # which says so itself
            raise
        raise UsageError(f"{flag} {text}: {error}") from error
    return spelled
