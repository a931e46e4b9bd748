"""Means of paired differences with their intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from know_cli.errors import UsageError

#: Coverage of every interval here.
LEVEL = 0.95
#: The largest measure that can be compared: squares of larger differences are no numbers.
LARGEST = 1e150
# Beyond this many measures nobody waits for the answer.
_MOST_PAIRS = 100_000


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its 95 % interval.

    Attributes:
        pairs: how many differences there are.
        mean: their mean.
        low, high: the interval's ends; −∞ and ∞ for fewer than two pairs.
        spread: standard deviation of one difference; NaN for fewer than two pairs.
    """

    pairs: int
    mean: float
    low: float
    high: float
    spread: float

    @property
    def includes_zero(self) -> bool:
        """Whether the interval cannot tell the mean from zero."""
        return self.low <= 0 <= self.high


def check_intervals() -> None:
    """Refuse to start where intervals cannot be computed.

    Raises:
        UsageError: scipy is not installed.
    """
    _quantile(1)


def difference(differences: Sequence[float]) -> Difference:
    """Mean and interval of paired differences.

    >>> found = difference([1.0, 2.0, 3.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)

    Args:
        differences: one per seed.

    Raises:
        UsageError: scipy is not installed.
    """
    count = len(differences)
    mean = float(np.mean(differences)) if count else math.nan
    if count < 2:
        return Difference(count, mean, -math.inf, math.inf, math.nan)
    spread = float(np.std(differences, ddof=1))
    half = _quantile(count - 1) * spread / math.sqrt(count)
    return Difference(count, mean, mean - half, mean + half, spread)


def pairs_to_tell(found: Difference) -> int | None:
    """How many pairs would tell a difference of the size and spread seen from zero.

    Returns:
        The smallest number whose interval around the mean seen excludes zero; None if there is no
        spread to go by, or no number that anybody would wait for.
    """
    if not math.isfinite(found.spread) or found.mean == 0:
        return None
    low, high = 2, _MOST_PAIRS
    if not _tells(found, high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _tells(found, middle) else (middle + 1, high)
    return low


def _tells(found: Difference, pairs: int) -> bool:
    return abs(found.mean) > _quantile(pairs - 1) * found.spread / math.sqrt(pairs)


def _quantile(freedom: int) -> float:
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise UsageError("intervals need scipy: pip install 'know-predict[choose]'") from error
    return float(stdtrit(freedom, (1 + LEVEL) / 2))
