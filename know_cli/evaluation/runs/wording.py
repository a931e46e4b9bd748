"""Estimates as text for pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from know_cli.errors import counted
from know_cli.evaluation.statistics import Estimate


def difference_text(estimate: Estimate, scale: float) -> str:
    """An estimate ± half its interval, in a unit that is the value times ``scale``.

    A single seed has no interval.
    """
    places = digits(scale)
    if math.isnan(estimate.half_width):
        return f"{scale * estimate.value:+.{places}f}"
    return f"{scale * estimate.value:+.{places}f} ± {scale * estimate.half_width:.{places}f}"


def digits(scale: float) -> int:
    """Decimal places: points of 100 need fewer than nats."""
    return 2 if scale > 1 else 3


def with_ends(estimate: Estimate) -> str:
    """An estimate with the ends of its interval."""
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def gain_text(estimate: Estimate | None) -> str:
    """A recovered gain with the ends of its interval; nothing if there is none."""
    return "" if estimate is None else with_ends(estimate)


def percent(share: float) -> str:
    """A share as a whole number of per cent."""
    return f"{share:.0%}".replace("%", " %")


def seeds_text(tasks: Iterable[Mapping[str, Any]]) -> str:
    """How many seeds the tasks of results have, and the first of them.

    >>> seeds_text([{"seeds": [5, 6]}, {"seeds": [5, 6, 7]}])
    '2 to 3 seeds each, from 5'
    >>> seeds_text([{"seeds": [5]}])
    '1 seed each, from 5'
    """
    seeds = [list(task["seeds"]) for task in tasks]
    fewest, most = min(map(len, seeds)), max(map(len, seeds))
    count = ("" if fewest == most else f"{fewest} to ") + counted(most, "seed")
    return f"{count} each, from {min(map(min, seeds))}"
