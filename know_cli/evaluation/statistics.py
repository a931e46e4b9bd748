"""Paired differences over seeds with their intervals, and the recovered gain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from know_cli.errors import UsageError
from know_cli.evaluation.anchors import LONGER, NAIVE, ORACLE, SCRATCH

_LEVEL = 0.95
_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 5059

Values = NDArray[np.float64]


class Status(str, Enum):
    """Whether a comparison can show a gain, and if not, why."""

    DATA_LIMITED = "data-limited"
    NO_TRANSFER = "pre-training does not help"
    LONGER = "longer training explains the gain"
    NO_GAIN = "more data does not help"
    UNKNOWN = "too few seeds"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; NaN for a single seed.
    """

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """A comparison of the starts of one cell.

    Attributes:
        seeds: their number.
        means: by start, the mean over seeds.
        differences: by start, the paired difference from Θ0 (naive), by Student's t.
        base: ``naive`` or ``longer``, whichever has the higher mean.
        oracle: the paired difference of the oracle from the base.
        status: whether the cell can show a gain.
        gains: by start, the recovered gain; empty unless the cell is data-limited.
    """

    seeds: int
    means: Mapping[str, float]
    differences: Mapping[str, Estimate]
    base: str
    oracle: Estimate
    status: Status
    gains: Mapping[str, Estimate]


def interval_half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of a mean, by Student's t; NaN for a single value.

    Raises:
        UsageError: scipy, which comes with scikit-learn, is not installed.
    """
    if len(values) < 2:
        return math.nan
    return _quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _quantile(freedom: int) -> float:
    """What a standard error is multiplied by, by Student's t."""
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise UsageError("intervals need scipy: pip install 'know-predict[demo]'") from error
    return float(stdtrit(freedom, (1 + _LEVEL) / 2))


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean with its interval by Student's t."""
    mean, half = float(np.mean(values)), interval_half_width(values)
    return Estimate(mean, mean - half, mean + half)


def clustered_estimate(clusters: Iterable[Sequence[float]]) -> Estimate:
    """Mean of all values, with an interval that takes only the clusters to be independent.

    With as many values in each it is Student's t of the clusters' means; with others, the
    cluster-robust variance of a mean with the correction for few clusters (Liang & Zeger 1986;
    CR1 in Cameron & Miller 2015, section II).

    Args:
        clusters: values that may go together, such as those of trials with the same data; at least
            one value.

    Example:
        >>> clustered_estimate([[1.0, 1.0], [3.0, 3.0]]) == mean_estimate([1.0, 3.0])
        True
    """
    found = [np.asarray(values, np.float64) for values in clusters if len(values)]
    count, total = len(found), sum(map(len, found))
    mean = math.fsum(float(values.sum()) for values in found) / total
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    squares = math.fsum(float((values - mean).sum()) ** 2 for values in found)
    half = _quantile(count - 1) * math.sqrt(squares * count / (count - 1)) / total
    return Estimate(mean, mean - half, mean + half)


def recovered_gain(
    method: Sequence[float], base: Sequence[float], oracle: Sequence[float]
) -> Estimate:
    """(method − base) / (oracle − base), a ratio of means over seeds.

    The interval is that of the percentile bootstrap over seeds, which has a fixed random seed.

    Args:
        method: one value per seed.
        base: for the same seeds.
        oracle: for the same seeds.

    Example:
        >>> recovered_gain([0.6, 0.7], [0.5, 0.6], [0.7, 0.8]).value
        0.5
    """
    first = np.asarray(base, np.float64)
    whole = np.asarray(oracle, np.float64) - first
    return _share(
        np.asarray(method, np.float64) - first, whole, whole[_resamples(len(whole))].mean(1)
    )


@cache
def _resamples(seeds: int) -> NDArray[np.int64]:
    """The seeds that each bootstrap resample has, ``[resamples, seeds]``."""
    generator = np.random.default_rng(_BOOTSTRAP_SEED)
    return generator.integers(seeds, size=(_RESAMPLES, seeds))


def _share(gain: Values, whole: Values, whole_drawn: Values) -> Estimate:
    """The ratio of two means ``[seeds]``; of the second, its resamples' means are given."""
    # With few seeds, the oracle may have no gain at all in a resample.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = gain[_resamples(len(gain))].mean(1) / whole_drawn
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Estimate(round(float(gain.mean() / whole.mean()), 12), float(low), float(high))


def compare(values: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare the starts of one cell.

    Args:
        values: by start, including the anchors, one value per seed, all for the same seeds in
            the same order.

    Raises:
        UsageError: scipy is not installed.
    """
    arrays = {name: np.asarray(found, np.float64) for name, found in values.items()}
    means = {name: float(array.mean()) for name, array in arrays.items()}
    naive = arrays[NAIVE]
    base = LONGER if means[LONGER] > means[NAIVE] else NAIVE
    oracle = mean_estimate(list(arrays[ORACLE] - arrays[base]))
    status = _status(arrays, oracle)
    gains = {}
    if status is Status.DATA_LIMITED:
        whole = arrays[ORACLE] - arrays[base]
        drawn = whole[_resamples(len(whole))].mean(1)
        gains = {name: _share(array - arrays[base], whole, drawn) for name, array in arrays.items()}
    differences = {
        name: mean_estimate(list(array - naive)) for name, array in arrays.items() if name != NAIVE
    }
    return Comparison(len(naive), means, differences, base, oracle, status, gains)


def _status(arrays: Mapping[str, Values], oracle: Estimate) -> Status:
    def is_above(upper: str, lower: str) -> bool:
        return mean_estimate(list(arrays[upper] - arrays[lower])).low > 0

    if len(arrays[NAIVE]) < 2:
        return Status.UNKNOWN
    if not is_above(NAIVE, SCRATCH):
        return Status.NO_TRANSFER
    if oracle.low > 0:
        return Status.DATA_LIMITED
    # The oracle does not beat the base, but it may beat Θ0.
    return Status.LONGER if is_above(LONGER, NAIVE) or is_above(ORACLE, NAIVE) else Status.NO_GAIN
