"""Times several functions in turn, so that a busy moment of the machine affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per round.

    Attributes:
        wall: by the wall clock.
        processor: of all threads of this process together, the steadier of the two on a busy
            machine.
    """

    wall: tuple[float, ...]
    processor: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Median wall-clock time."""
        return median(self.wall)

    @property
    def processor_seconds(self) -> float:
        """Median processor time."""
        return median(self.processor)


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = True,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Call all functions in turn, ``rounds`` times, after one call of each to warm up.

    Args:
        functions: by name.
        rounds: how often each is timed.
        warm_up: whether each is called once before.
        before: called before each of them, and not timed.
    """
    if warm_up:
        for function in functions.values():
            before()
            function()
    wall: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            before()
            began, began_processor = time.perf_counter(), time.process_time()
            function()
            processor[name].append(time.process_time() - began_processor)
            wall[name].append(time.perf_counter() - began)
    return {name: Times(tuple(wall[name]), tuple(processor[name])) for name in functions}


def median_ratio(slow: tuple[float, ...], fast: tuple[float, ...]) -> float:
    """Median over the rounds of the ratio of the first's time to the second's."""
    return median(one / other for one, other in zip(slow, fast, strict=True))
