"""Nested subsets D0 ⊃ D1 ⊃ … of a data set (the paper's section on structured forgetting)."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from know_cli.errors import UsageError, counted

Indices = NDArray[np.int64]

#: No recording has more sessions or branches.
MOST_SESSIONS = 1000
# The numbers of more samples fit into no memory.
_MOST_SAMPLES = 1 << 40
_MOST_SIZES_SHOWN = 10


def check_size(n: int) -> None:
    """Refuse a number of training samples that cannot be.

    Raises:
        UsageError: it is below 1, or more than fits into any memory.
    """
    if not 1 <= n <= _MOST_SAMPLES:
        raise UsageError(f"{n} samples: give a number from 1 to {_MOST_SAMPLES}")


def subset_sizes(n: int, rate: float, sessions: int) -> list[int]:
    """Sizes of D0, D1, …: ``round(rate ** k * n)``.

    Raises:
        UsageError: the rate is not between 0 and 1, a number cannot be, or a subset would be empty.

    Example:
        >>> subset_sizes(100, 0.5, 4)
        [100, 50, 25, 12]
    """
    if not 0 < rate < 1:
        raise UsageError(f"sampling rate {rate:g}: must lie between 0 and 1, for example 0.5")
    if sessions < 1:
        raise UsageError(f"{sessions} sessions: at least 1 is needed")
    if sessions > MOST_SESSIONS:
        raise UsageError(f"{sessions} sessions: at most {MOST_SESSIONS} can be recorded")
    check_size(n)
    sizes = [round(rate**k * n) for k in range(sessions)]
    if sizes[-1] < 1:
        shown = ", ".join(map(str, sizes[:_MOST_SIZES_SHOWN]))
        more = ", …" if sessions > _MOST_SIZES_SHOWN else ""
        raise UsageError(
            f"{counted(n, 'sample')} {'is' if n == 1 else 'are'} too few for "
            f"{counted(sessions, 'session')} at sampling rate {rate:g}: the "
            f"sizes would be {shown}{more}; use fewer sessions or a higher rate"
        )
    return sizes


def nested_subsets(
    n: int, rate: float, sessions: int, seed: int, labels: ArrayLike | None = None
) -> list[Indices]:
    """Draw the nested subsets of a data set that the sessions train on.

    With labels, the number of samples of each class differs from its exact share by less than
    one in every subset.

    Args:
        n: number of samples.
        rate: share of samples kept from one session to the next, in (0, 1).
        sessions: number of subsets, including the full set.
        seed: not negative; the same seed gives the same subsets.
        labels: ``[n]`` class of each sample, of any sortable type.

    Returns:
        For each session, its sorted int64 indices into the data set; the first has all of them.

    Raises:
        UsageError: the rate is not between 0 and 1, a number cannot be, a subset would be empty,
            or the number of labels is not ``n``.

    Example:
        >>> [len(subset) for subset in nested_subsets(100, 0.5, 3, seed=0)]
        [100, 50, 25]
    """
    sizes = subset_sizes(n, rate, sessions)
    if seed < 0:
        raise UsageError(f"seed {seed}: must not be negative")
    generator = np.random.default_rng(seed)
    largest = sizes[1] if sessions > 1 else 0
    if labels is None:
        order = generator.permutation(n)
    else:
        order = _stratified_order(n, np.asarray(labels), largest, generator)
    return [np.arange(n, dtype=np.int64), *(np.sort(order[:size]) for size in sizes[1:])]


def _stratified_order(
    n: int, labels: NDArray[Any], count: int, generator: np.random.Generator
) -> Indices:
    """The first ``count`` samples of an order in which every prefix keeps all classes' shares.

    Rounding the shares of each subset separately would not give nested subsets. Instead, samples
    are added one by one: the j-th sample of a class with m of n samples may come at position
    ⌊(j−1)·n/m⌋ at the earliest and must come by position ⌈j·n/m⌉. Serving the earliest deadline
    first always succeeds (proportionate fair scheduling) and keeps each class within one sample
    of its share in every prefix.
    """
    if labels.shape != (n,):
        raise UsageError(
            f"labels have shape {labels.shape}; {counted(n, 'sample')} need{'s' * (n == 1)} ({n},)"
        )
    _, classes = np.unique(labels, return_inverse=True)
    members = [
        generator.permutation(np.flatnonzero(classes == c)) for c in range(classes.max() + 1)
    ]
    # Classes with equal deadlines take turns in an order drawn from the seed.
    rank = generator.permutation(len(members))
    waiting = [(0, int(rank[c]), c) for c in range(len(members))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    taken = [0] * len(members)
    order = np.empty(count, dtype=np.int64)
    for position in range(count):
        while waiting and waiting[0][0] <= position:
            _, turn, c = heapq.heappop(waiting)
            deadline = -(-(taken[c] + 1) * n // len(members[c]))
            heapq.heappush(ready, (deadline, turn, c))
        _, turn, c = heapq.heappop(ready)
        order[position] = members[c][taken[c]]
        taken[c] += 1
        if taken[c] < len(members[c]):
            heapq.heappush(waiting, (taken[c] * n // len(members[c]), turn, c))
    return order
