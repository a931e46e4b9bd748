"""The search: seeds that choose a start, and other seeds that confirm the choice.

Choosing is successive halving (Karnin, Koren and Somekh, "Almost optimal exploration in multi-armed
bandits", ICML 2013): all arms are measured with the same new seeds, the lower half is dropped, and
those that stay are measured with further seeds. Θ0 is measured in every round, so every comparison
is paired by seed. The best of several noisy means is too high by selection, so the reported
difference comes only from seeds that took no part in choosing.

A search is a generator: it yields the trials that it wants measured and is sent their results.
Whatever runs them (a process, several machines, a log of an earlier run) stays outside.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from know_cli.choosing.intervals import Difference, difference, pairs_to_tell
from know_cli.errors import UsageError, counted

#: The start that everything is compared with.
BASE = "theta0"
#: Θ0 moved in a random direction, as far as the winner is from it.
RANDOM = "random-direction"
#: Share of the budget that confirms.
CONFIRMING = 0.5
#: Share of the confirming trials that measure the random direction.
_CONTROL = 0.2
_FEWEST_PAIRS = 3


class Purpose(str, Enum):
    """What a trial's result is used for; no seed serves both."""

    CHOOSING = "choosing"
    CONFIRMING = "confirming"


@dataclass(frozen=True, order=True)
class Arm:
    """A start together with the values of the tuned placeholders.

    Attributes:
        start: name of the candidate.
        values: (name, value) of each tuned placeholder, in the order of the command line.
    """

    start: str
    values: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The start, with the tuned values after it."""
        return " ".join([self.start, *(f"{name}={value}" for name, value in self.values)])


@dataclass(frozen=True)
class Trial:
    """One measure that is to be taken."""

    arm: Arm
    seed: int
    purpose: Purpose


#: Results of trials, larger is better; None for one that failed.
Results = Mapping[Trial, float | None]
Procedure = Generator[list[Trial], Results, "Outcome"]


@dataclass(frozen=True)
class Settings:
    """How a search spends its measures.

    Attributes:
        budget: how many measures there are in all.
        confirming: share of them that confirms.
        first_seed: the choosing seeds count up from it; the confirming ones come after them.
    """

    budget: int
    confirming: float = CONFIRMING
    first_seed: int = 0


@dataclass
class Standing:
    """How an arm did in choosing.

    Attributes:
        arm: the start and its tuned values.
        results: seed → measure.
        rounds: in how many rounds it was measured.
        failed: whether a measure failed, which ends it.
    """

    arm: Arm
    results: dict[int, float] = field(default_factory=dict)
    rounds: int = 0
    failed: bool = False

    @property
    def mean(self) -> float:
        """Mean over its seeds; −∞ where it failed or was not measured."""
        if self.failed or not self.results:
            return -math.inf
        return sum(self.results.values()) / len(self.results)


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        base: Θ0 with its own best tuned values.
        winner: the best candidate in choosing; None if it was below Θ0 for sure, or all failed.
        standings: every arm, the longest measured and best first.
        choosing: the winner's paired difference to Θ0 on the seeds that chose it: too high.
        confirmed: the same on fresh seeds; None without a winner.
        random: the random direction's paired difference to Θ0 on fresh seeds.
        measures: how many measures were taken.
        at_edge: tuned names whose best value for Θ0 or the winner is at the end of its grid.
    """

    base: Arm
    winner: Arm | None
    standings: tuple[Standing, ...]
    choosing: Difference | None
    confirmed: Difference | None
    random: Difference | None
    measures: int
    at_edge: tuple[tuple[str, str], ...] = ()

    @property
    def is_better(self) -> bool:
        """Whether the confirmation's interval lies above zero."""
        return self.confirmed is not None and self.confirmed.low > 0

    @property
    def more_measures(self) -> int | None:
        """How many more measures would tell a difference of the size seen; None if unknown."""
        if self.confirmed is None or self.is_better:
            return None
        pairs = pairs_to_tell(self.confirmed)
        return None if pairs is None else max(2 * (pairs - self.confirmed.pairs), 0)


class BaseFailedError(Exception):
    """A measure of Θ0 failed, so that nothing can be compared."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial.arm.name)
        self.trial = trial


def search(
    candidates: Sequence[str], grid: Sequence[tuple[tuple[str, str], ...]], settings: Settings
) -> Procedure:
    """Choose among candidates and confirm the choice.

    Args:
        candidates: names of the starts beside Θ0, at least one.
        grid: the combinations of tuned values, each a tuple of (name, value); one empty tuple
            where nothing is tuned.
        settings: the budget.

    Yields:
        Trials to measure; is sent their results.

    Returns:
        What was found.

    Raises:
        UsageError: the budget is too small.
        BaseFailedError: a measure of Θ0 failed.
    """
    budget = _split(len(candidates), len(grid), settings)
    base = [Standing(Arm(BASE, values)) for values in grid]
    others = [Standing(Arm(start, values)) for start in candidates for values in grid]
    every = [*base, *others]
    seed, left = settings.first_seed, budget.choosing
    alive_base, alive = list(base), list(others)
    rounds_left = max(1, math.ceil(math.log2(max(len(others), 2))))
    # Where the budget no longer holds all that are left, it goes to the best of them.
    while alive and left > len(alive_base):
        alive = alive[: left - len(alive_base)]
        arms = [*alive_base, *alive]
        count = max(1, left // (rounds_left * len(arms)))
        trials = [
            Trial(standing.arm, seed + k, Purpose.CHOOSING)
            for k in range(count)
            for standing in arms
        ]
        results = yield trials
        for standing in arms:
            standing.rounds += 1
            for k in range(count):
                _record(standing, Trial(standing.arm, seed + k, Purpose.CHOOSING), results)
        seed, left = seed + count, left - len(trials)
        rounds_left = max(rounds_left - 1, 1)
        alive = _upper_half(alive)
        # Θ0 keeps two values to the end: its best one must be known as well as the winner's.
        alive_base = sorted(alive_base, key=lambda s: -s.mean)[: max(2, -(-len(alive_base) // 2))]
        if len(alive) == 1 and len(alive_base) == 1 and left < 2:
            break
    best_base = max(alive_base, key=lambda standing: (len(standing.results), standing.mean))
    measured = max((len(standing.results) for standing in alive), default=0)
    finalists = [s for s in alive if len(s.results) == measured and not s.failed]
    winner = max(finalists, key=lambda standing: standing.mean, default=None)
    taken = budget.choosing - left
    standings = tuple(sorted(every, key=lambda s: (-s.rounds, -s.mean)))
    choosing = None
    if winner is not None:
        shared = sorted(winner.results.keys() & best_base.results.keys())
        choosing = difference([winner.results[k] - best_base.results[k] for k in shared])
    # What choosing cannot tell from Θ0 is worth the rest of the budget; what is worse is not.
    if winner is None or choosing is None or choosing.high < 0:
        edges = _edges(grid, best_base.arm)
        return Outcome(best_base.arm, None, standings, None, None, None, taken, edges)
    confirmed, control = yield from _confirm(best_base.arm, winner.arm, seed, budget)
    return Outcome(
        best_base.arm,
        winner.arm,
        standings,
        choosing,
        confirmed,
        control,
        taken + 2 * budget.pairs + budget.controls,
        _edges(grid, best_base.arm, winner.arm),
    )


def _confirm(
    base: Arm, winner: Arm, seed: int, budget: _Budget
) -> Generator[list[Trial], Results, tuple[Difference | None, Difference | None]]:
    """Measure Θ0, the winner and the random direction with seeds that nothing has seen."""
    control = Arm(RANDOM, base.values)
    trials = []
    for k in range(budget.pairs):
        arms = [base, winner, control] if k < budget.controls else [base, winner]
        trials += [Trial(arm, seed + k, Purpose.CONFIRMING) for arm in arms]
    results = yield trials
    found: dict[Arm, dict[int, float]] = {base: {}, winner: {}, control: {}}
    for trial in trials:
        value = results.get(trial)
        if value is None and trial.arm == base:
            raise BaseFailedError(trial)
        if value is not None:
            found[trial.arm][trial.seed] = value
    differences = []
    for arm in (winner, control):
        seeds = sorted(found[arm].keys() & found[base].keys())
        differences.append(difference([found[arm][k] - found[base][k] for k in seeds]))
    # A start that fails now and then is not better, whatever the other seeds say.
    complete = len(found[winner]) == budget.pairs
    return differences[0] if complete else None, differences[1] if found[control] else None


@dataclass(frozen=True)
class _Budget:
    """Measures for choosing, pairs for confirming, and measures of the random direction."""

    choosing: int
    pairs: int
    controls: int


def _split(candidates: int, values: int, settings: Settings) -> _Budget:
    if candidates < 1:
        raise UsageError("there is no candidate beside Θ0")
    one_round = (candidates + 1) * values
    fewest = one_round + 2 * _FEWEST_PAIRS + 1
    if settings.budget < fewest:
        raise UsageError(
            f"--budget {settings.budget}: {counted(candidates, 'candidate')} and Θ0"
            f"{f' with {values} values each' if values > 1 else ''} need at least {fewest} "
            "measures; give a larger budget, or fewer candidates"
        )
    confirming = max(2 * _FEWEST_PAIRS + 1, math.floor(settings.budget * settings.confirming))
    confirming = min(confirming, settings.budget - one_round)
    controls = max(1, math.floor(confirming * _CONTROL))
    pairs = (confirming - controls) // 2
    controls = min(confirming - 2 * pairs, pairs)
    return _Budget(settings.budget - 2 * pairs - controls, pairs, controls)


def _record(standing: Standing, trial: Trial, results: Results) -> None:
    value = results[trial]
    if value is not None:
        standing.results[trial.seed] = value
    elif standing.arm.start == BASE:
        raise BaseFailedError(trial)
    else:
        standing.failed = True


def _upper_half(alive: list[Standing]) -> list[Standing]:
    """The better half of the arms that did not fail, at least one."""
    whole = sorted((s for s in alive if not s.failed), key=lambda standing: -standing.mean)
    return whole[: -(-len(whole) // 2)]


def _edges(grid: Sequence[tuple[tuple[str, str], ...]], *arms: Arm) -> tuple[tuple[str, str], ...]:
    """(start, name) where the best tuned value is the smallest or largest of its grid.

    Values may be given in any order; what is no number, such as an optimiser, has no end.
    """
    found = []
    for arm in arms:
        for position, (name, value) in enumerate(arm.values):
            values = {_size(combination[position][1]) for combination in grid}
            if len(values) > 1 and None not in values:
                sizes = [size for size in values if size is not None]
                if _size(value) in (min(sizes), max(sizes)):
                    found.append((arm.start, name))
    return tuple(found)


def _size(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
