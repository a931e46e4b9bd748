"""Runs a search: trials to measures, several at once, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from know_cli.choosing.log import Log
from know_cli.choosing.measures import Measure, Result
from know_cli.choosing.search import (
    BASE,
    RANDOM,
    Arm,
    Outcome,
    Procedure,
    Purpose,
    Settings,
    Trial,
    search,
)
from know_cli.errors import UsageError


class Listener(Protocol):
    """Is told how a search goes on."""

    def planned(self, trials: Sequence[Trial]) -> None:
        """These are measured next."""

    def measured(self, trial: Trial, result: Result) -> None:
        """One has been measured, now or in an earlier run."""


class Deaf:
    """A listener that does nothing."""

    def planned(self, trials: Sequence[Trial]) -> None:
        """See :class:`Listener`."""

    def measured(self, trial: Trial, result: Result) -> None:
        """See :class:`Listener`."""


class BaseMeasureError(UsageError):
    """Θ0 could not be measured.

    Attributes:
        result: with the end of what the measure wrote.
    """

    def __init__(self, result: Result) -> None:
        super().__init__(
            f"the measure fails for Θ0 itself: it {result.reason}; a search would compare nothing"
        )
        self.result = result


@dataclass
class Runner:
    """How trials are measured.

    Attributes:
        starts: name of a start → its path, Θ0's under :data:`~know_cli.choosing.search.BASE`.
        measure: takes a measure.
        confirm: takes those of the confirmation; None is ``measure`` with other seeds.
        minimise: whether smaller is better.
        jobs: how many at once.
        log: keeps results; None keeps none.
        make_random: makes the random direction as far from Θ0 as a start is, and gives its path.
        listener: is told of everything.
    """

    starts: Mapping[str, Path]
    measure: Measure
    confirm: Measure | None = None
    minimise: bool = False
    jobs: int = 1
    log: Log | None = None
    make_random: Callable[[str], Path] | None = None
    listener: Listener = field(default_factory=Deaf)
    _random: Path | None = None
    _random_of: str = ""

    def run(self, procedure: Procedure) -> Outcome:
        """Run a search to its end.

        Raises:
            BaseMeasureError: Θ0 cannot be measured.
            OutputError: the log cannot be written.
        """
        try:
            trials = next(procedure)
            while True:
                trials = procedure.send(self._take_all(trials))
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome

    def _take_all(self, trials: Sequence[Trial]) -> dict[Trial, float | None]:
        self.listener.planned(trials)
        if any(trial.arm.start == RANDOM for trial in trials):
            if self.make_random is None:
                trials = [trial for trial in trials if trial.arm.start != RANDOM]
            else:
                self._make_random(trials)
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)
        found: dict[Trial, Result] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting: dict[Future[Result], Trial] = {}
            for trial in trials:
                known = self.log.get(self._logged(trial)) if self.log is not None else None
                if known is not None:
                    found[trial] = known
                    self.listener.measured(trial, known)
                else:
                    waiting[pool.submit(self._take, trial, slots)] = trial
            try:
                for done in as_completed(waiting):
                    trial, result = waiting[done], done.result()
                    found[trial] = result
                    if self.log is not None:
                        self.log.add(self._logged(trial), result)
                    self.listener.measured(trial, result)
                    if result.value is None and trial.arm.start == BASE:
                        raise BaseMeasureError(result)
            except BaseException:
                for future in waiting:
                    future.cancel()
                self.measure.close()
                if self.confirm is not None:
                    self.confirm.close()
                raise
        sign = -1.0 if self.minimise else 1.0
        return {
            trial: None if result.value is None else sign * result.value
            for trial, result in found.items()
        }

    def _take(self, trial: Trial, slots: SimpleQueue[int]) -> Result:
        slot = slots.get()
        try:
            path = self._random if trial.arm.start == RANDOM else self.starts[trial.arm.start]
            assert path is not None, "the random direction is made before it is measured"
            confirms = trial.purpose is Purpose.CONFIRMING and self.confirm is not None
            measure = self.confirm if confirms and self.confirm else self.measure
            return measure.take(path, trial.seed, dict(trial.arm.values), slot)
        finally:
            slots.put(slot)

    def _make_random(self, trials: Sequence[Trial]) -> None:
        winner = next(t.arm.start for t in trials if t.arm.start not in (BASE, RANDOM))
        assert self.make_random is not None
        self._random, self._random_of = self.make_random(winner), winner

    def _logged(self, trial: Trial) -> Trial:
        """A trial as the log has it: another winner's random direction has another length.

        Who wins may change from one run to the next, since what failed is measured again.
        """
        if trial.arm.start != RANDOM:
            return trial
        return replace(trial, arm=Arm(f"{RANDOM} of {self._random_of}", trial.arm.values))


def choose(
    starts: Mapping[str, Path],
    measure: Measure,
    settings: Settings,
    grid: Sequence[tuple[tuple[str, str], ...]] = ((),),
    *,
    minimise: bool = False,
    jobs: int = 1,
) -> Outcome:
    """Choose among starts that are there already; the library's door to a search.

    Args:
        starts: name → path of each start; Θ0's name is
            :data:`~know_cli.choosing.search.BASE`.
        measure: takes a path, a seed and tuned values, and gives a number.
        settings: the budget.
        grid: combinations of tuned values.
        minimise: whether smaller is better.
        jobs: how many measures at once.

    Example:
        >>> from pathlib import Path
        >>> from know_cli.choosing import choose
        >>> from know_cli.choosing.measures import Result
        >>> from know_cli.choosing.search import BASE, Settings
        >>> starts = {BASE: Path("first"), "a": Path("a"), "b": Path("b")}
        >>> for size, path in enumerate(starts.values()):
        ...     written = path.write_bytes(bytes(size))
        >>> class Size:  # of a file; yours fine-tunes from it and measures
        ...     def take(self, start, seed, values, slot):
        ...         return Result(start.stat().st_size + seed)
        ...
        ...     def close(self):
        ...         pass
        >>> outcome = choose(starts, Size(), Settings(budget=16))
        >>> outcome.winner.start, outcome.is_better, outcome.confirmed.mean
        ('b', True, 2.0)

    Raises:
        UsageError: the budget is too small, there is no Θ0, or it cannot be measured.
    """
    if BASE not in starts:
        raise UsageError(f"the starts have no {BASE!r}, which the others are compared with")
    names = [name for name in starts if name != BASE]
    return Runner(starts, measure, minimise=minimise, jobs=jobs).run(search(names, grid, settings))
