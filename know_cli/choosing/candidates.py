"""What is compared with Θ0: which candidates, and how each is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError, quoted
from know_cli.methods.registry import find_method, parse_options

_STEPS, _WEIGHTS = "steps", "weights"
_UNSAFE = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Candidate:
    """A start to compare, as ``know predict`` makes it.

    Attributes:
        text: as on the command line: ``METHOD,option=value,steps=2``.
        method: its method.
        options: of the method, as text.
        steps: how many are predicted.
        weights: bundle of a method that reads one; None is its default.
    """

    text: str
    method: str
    options: tuple[str, ...] = ()
    steps: int = 1
    weights: str | None = None

    @property
    def name(self) -> str:
        """Its text without what a file's name should not have."""
        return _UNSAFE.sub("-", self.text).strip("-")

    def request(self) -> dict[str, Any]:
        """Its part of a request's keyword arguments, without checkpoints, output and settings."""
        found: dict[str, Any] = {
            "method": self.method,
            "options": parse_options(find_method(self.method), self.options),
        }
        if self.weights is not None:
            found["weights"] = self.weights
        return found


def parse_candidate(text: str) -> Candidate:
    """Read ``METHOD,option=value,steps=2``.

    >>> parse_candidate("shrink,lambda=0.9,steps=2").steps
    2

    Raises:
        UsageError: there is no such method or option, or a value that cannot be.
    """
    method, *rest = text.split(",")
    options, steps, weights = [], 1, None
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(
                f"--candidate {text}: {quoted(part)} has no value; write "
                "METHOD,option=value,steps=2"
            )
        if name == _STEPS:
            try:
                steps = int(value)
            except ValueError:
                raise UsageError(f"--candidate {text}: steps={value} is not a number") from None
        elif name == _WEIGHTS:
            weights = value
        else:
            options.append(part)
    candidate = Candidate(text, method, tuple(options), steps, weights)
    try:
        candidate.request()
    except UsageError as error:
        raise UsageError(f"--candidate {text}: {error}") from error
    return candidate


#: The word that stands for the usual candidates among others.
USUAL = "usual"

# What is worth a measure for each kind of trajectory.
_USUAL: Mapping[TrajectoryKind, tuple[str, ...]] = {
    TrajectoryKind.FORGETTING: (
        "known",
        "known,steps=2",
        "known,steps=3",
        "known,weights=retrodiction",
        "known,weights=retrodiction,steps=2",
        "known,weights=retrodiction,steps=3",
        "average",
        "shrink,lambda=0.9",
        "shrink,lambda=0.8",
        "shrink,lambda=0.6",
        "last",
        "task-vector,alpha=0.5",
        "task-vector,alpha=1",
    ),
    TrajectoryKind.RUN: (
        "average,last=2",
        "average,last=3",
        "average,last=5",
        "average",
        "average,shape=linear",
        "average,shape=sqrt",
        "average,shape=cosine",
        "shrink,lambda=0.9",
        "shrink,lambda=0.8",
        "task-vector,alpha=0.5",
    ),
    TrajectoryKind.BRANCHES: ("average", "shrink,lambda=0.9", "shrink,lambda=0.8"),
}
_LAST = re.compile(r"last=(\d+)")


def choose_candidates(
    texts: Sequence[str], checkpoints: int, kind: TrajectoryKind = TrajectoryKind.FORGETTING
) -> list[Candidate]:
    """The candidates that a command line asks for.

    Args:
        texts: of ``--candidate``; none gives the usual ones.
        checkpoints: S.
        kind: of the trajectory.

    Raises:
        UsageError: a text is wrong, or two make the same file.
    """
    expanded = [
        one for text in texts or (USUAL,) for one in (_USUAL[kind] if text == USUAL else (text,))
    ]
    found = [parse_candidate(text) for text in dict.fromkeys(expanded)]
    names = [candidate.name for candidate in found]
    for candidate in found:
        if names.count(candidate.name) > 1:
            raise UsageError(f"--candidate {candidate.text}: another one has the same name")
    return found


def _asks_for_more(text: str, checkpoints: int) -> bool:
    """Whether a usual candidate averages more checkpoints than there are, or all, by number."""
    found = _LAST.search(text)
    return found is not None and int(found[1]) >= checkpoints
