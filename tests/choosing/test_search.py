"""The search itself: its budget, what is dropped, what confirms, and how often it is right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from know_cli.choosing.intervals import difference
from know_cli.choosing.search import (
    BASE,
    RANDOM,
    Arm,
    BaseFailedError,
    Outcome,
    Procedure,
    Purpose,
    Settings,
    Trial,
    search,
)
from know_cli.choosing.simulation import World, run, simulate
from know_cli.errors import UsageError

GRID = [(("lr", "1"),), (("lr", "2"),), (("lr", "4"),)]


def follow(procedure: Procedure, value: object) -> tuple[Outcome, list[Trial]]:
    """Run a search with ``value(trial)`` for every measure."""
    taken: list[Trial] = []
    assert callable(value)
    try:
        trials = next(procedure)
        while True:
            taken += trials
            trials = procedure.send({trial: value(trial) for trial in trials})
    except StopIteration as end:
        return end.value, taken


@given(st.integers(1, 14), st.integers(1, 3), st.integers(0, 120), st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_budget_holds_and_no_seed_serves_twice(
    candidates: int, values: int, more: int, seed: int
) -> None:
    grid = GRID[:values] if values > 1 else [()]
    fewest = (candidates + 1) * len(grid) + 7
    generator = np.random.default_rng(seed)
    outcome, taken = follow(
        search([f"c{k}" for k in range(candidates)], grid, Settings(fewest + more)),
        lambda trial: float(generator.standard_normal()) + (trial.arm.start == "c0"),
    )
    assert len(taken) == len(set(taken)) == outcome.measures <= fewest + more
    seeds = {
        purpose: {trial.seed for trial in taken if trial.purpose is purpose} for purpose in Purpose
    }
    assert not seeds[Purpose.CHOOSING] & seeds[Purpose.CONFIRMING]
    # Every comparison is paired: Θ0 is measured with every seed.
    for purpose, found in seeds.items():
        base = {t.seed for t in taken if t.arm.start == BASE and t.purpose is purpose}
        assert base == found
    confirming = Counter(t.arm.start for t in taken if t.purpose is Purpose.CONFIRMING)
    if outcome.winner is not None:
        assert confirming[RANDOM] >= 1
        assert confirming[outcome.winner.start] == confirming[BASE] >= 3


def test_without_noise_the_best_is_found_and_its_difference_is_exact() -> None:
    world = World({BASE: 1.0, "a": 0.5, "b": 1.5, "c": 1.25}, noise=0.0, shared=3.0)
    outcome = run(search(["a", "b", "c"], [()], Settings(24)), world, np.random.default_rng(0))
    assert outcome.winner is not None
    assert outcome.winner.start == "b"
    assert outcome.is_better
    assert outcome.confirmed is not None
    assert outcome.confirmed.mean == pytest.approx(0.5)
    assert outcome.random is not None
    assert outcome.random.mean == pytest.approx(0.0)


def test_the_whole_budget_is_spent_and_a_tie_is_confirmed() -> None:
    """Measures of a small test set tie: only fresh seeds tell the winner from Θ0."""
    outcome, taken = follow(
        search([f"c{k}" for k in range(13)], [()], Settings(40)),
        lambda t: float(t.purpose is Purpose.CONFIRMING and t.arm.start != BASE),
    )
    assert Counter(trial.purpose for trial in taken) == {
        Purpose.CHOOSING: 20,
        Purpose.CONFIRMING: 20,
    }
    assert outcome.choosing is not None
    assert outcome.choosing.mean == 0
    assert outcome.is_better


def test_the_base_keeps_two_values_to_the_end() -> None:
    """One noisy round must not decide what everything is compared with."""
    _, taken = follow(
        search(["a", "b", "c", "d"], GRID, Settings(120)),
        lambda t: float(t.seed == 0 and t.arm.values == GRID[0]) + (t.arm.start == "a"),
    )
    of_base: dict[int, set[object]] = {}
    for trial in taken:
        if trial.purpose is Purpose.CHOOSING and trial.arm.start == BASE:
            of_base.setdefault(trial.seed, set()).add(trial.arm.values)
    assert len(of_base) > 2
    assert min(map(len, of_base.values())) == 2


def test_what_is_below_the_base_by_chance_is_confirmed() -> None:
    """Only what is surely worse is dropped without a confirmation: the interval says, not the mean."""

    def value(trial: Trial) -> float:
        if trial.arm.start == BASE:
            return 0.0
        if trial.purpose is Purpose.CHOOSING:
            return -1.0 if trial.seed % 2 == 0 else 0.9
        return 1.0

    outcome, _ = follow(search(["a"], [()], Settings(40)), value)
    assert outcome.choosing is not None
    assert outcome.choosing.mean < 0 < outcome.choosing.high
    assert outcome.is_better


def test_where_all_are_worse_the_answer_is_none_of_them() -> None:
    world = World({BASE: 1.0, "a": 0.5, "b": 0.25}, noise=0.0)
    outcome = run(search(["a", "b"], [()], Settings(24)), world, np.random.default_rng(0))
    assert outcome.winner is None
    assert not outcome.is_better
    assert outcome.confirmed is None


def test_a_candidate_that_fails_is_dropped_and_told() -> None:
    outcome, taken = follow(
        search(["bad", "good"], [()], Settings(24)),
        lambda t: None if t.arm.start == "bad" else float(t.arm.start == "good"),
    )
    assert outcome.winner is not None
    assert outcome.winner.start == "good"
    (bad,) = [standing for standing in outcome.standings if standing.arm.start == "bad"]
    assert bad.failed
    first = min(trial.seed for trial in taken if trial.arm.start == "bad")
    assert {t.seed for t in taken if t.arm.start == "bad"} <= set(range(first, first + 8))


def test_a_winner_that_fails_in_the_confirmation_is_not_better() -> None:
    def value(trial: Trial) -> float | None:
        is_last = trial.purpose is Purpose.CONFIRMING and trial.seed % 5 == 0
        return None if trial.arm.start == "a" and is_last else float(trial.arm.start == "a")

    outcome, _ = follow(search(["a", "b"], [()], Settings(40)), value)
    assert outcome.winner is not None
    assert not outcome.is_better


@pytest.mark.parametrize("purpose", Purpose)
def test_nothing_is_compared_with_a_base_that_fails(purpose: Purpose) -> None:
    def value(trial: Trial) -> float | None:
        return None if trial.arm.start == BASE and trial.purpose is purpose else 1.0 + trial.seed

    def larger(trial: Trial) -> float | None:
        found = value(trial)
        return found if found is None or trial.arm.start == BASE else found + 1

    with pytest.raises(BaseFailedError):
        follow(search(["a"], [()], Settings(24)), larger)


@pytest.mark.parametrize("values", [[1.0, -1.0, 2.0], [0.5, -0.1, 0.2, 0.3, -0.4]])
def test_so_many_more_measures_would_tell(values: list[float]) -> None:
    """A pair is two measures, of the start and of Θ0; the pairs are Student's t's."""
    confirmed = difference(values)
    outcome = Outcome(Arm(BASE), Arm("a"), (), confirmed, confirmed, None, 20)
    assert not outcome.is_better
    mean, spread, pairs = np.mean(values), np.std(values, ddof=1), 2
    while mean <= stats.t.ppf(0.975, pairs - 1) * spread / pairs**0.5:
        pairs += 1
    assert outcome.more_measures == 2 * (pairs - len(values)) > 0


def test_the_first_round_has_its_share_of_the_measures() -> None:
    """Two rounds of three candidates: each takes half of what chooses, which is half of all."""
    (first, *_) = [next(search(["a", "b", "c"], [()], Settings(160)))]
    assert Counter(trial.arm.start for trial in first) == dict.fromkeys([BASE, "a", "b", "c"], 10)


def test_a_budget_that_is_too_small_is_refused_with_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"--budget 19: 12 candidates and Θ0 need at least 20"):
        next(search([f"c{k}" for k in range(12)], [()], Settings(19)))
    with pytest.raises(UsageError, match="no candidate beside"):
        next(search([], [()], Settings(40)))


def test_every_start_gets_its_own_best_value_and_edges_are_told() -> None:
    best = {BASE: "2", "a": "4", "b": "2"}

    def value(trial: Trial) -> float:
        fits = best.get(trial.arm.start) == dict(trial.arm.values)["lr"]
        return 1.0 * fits + (trial.arm.start == "a")

    outcome, taken = follow(search(["a", "b"], GRID, Settings(60)), value)
    assert outcome.base.values == (("lr", "2"),)
    assert outcome.winner is not None
    assert (outcome.winner.start, outcome.winner.values) == ("a", (("lr", "4"),))
    assert outcome.confirmed is not None
    assert outcome.confirmed.mean == pytest.approx(1.0)
    assert outcome.at_edge == (("a", "lr"),)
    controls = {t.arm.values for t in taken if t.arm.start == RANDOM}
    assert controls == {(("lr", "2"),)}


@pytest.mark.parametrize(
    ("values", "best", "is_at_edge"),
    [
        (("3e-3", "1e-3", "1e-2"), "3e-3", False),  # the first, but neither smallest nor largest
        (("3e-3", "1e-3", "1e-2"), "1e-3", True),
        (("1e-3", "1e-2", "3e-3"), "3e-3", False),
        (("9e-4", "1e-3", "1e-2"), "1e-2", True),
        (("adam", "sgd"), "adam", False),
        (("1e-3",), "1e-3", False),
    ],
)
@pytest.mark.parametrize("is_better", [True, False])
def test_an_edge_is_the_smallest_or_largest_number_of_a_grid(
    values: tuple[str, ...], best: str, is_at_edge: bool, is_better: bool
) -> None:
    def value(trial: Trial) -> float:
        gain = 1.0 if is_better else -5.0
        return (dict(trial.arm.values)["it"] == best) + gain * (trial.arm.start == "a")

    grid = [(("it", one),) for one in values]
    outcome, _ = follow(search(["a"], grid, Settings(60)), value)
    assert outcome.base.values == (("it", best),)
    assert (outcome.winner is not None) == is_better
    starts = (BASE, "a") if is_better else (BASE,)
    assert outcome.at_edge == (tuple((start, "it") for start in starts) if is_at_edge else ())


# ------------------------------------------------------------------ simulated searches


def worlds(count: int, spread: float, seed: int) -> list[World]:
    generator = np.random.default_rng(seed)
    return [
        World({BASE: 0.0} | {f"c{k}": spread * generator.standard_normal() for k in range(12)}, 1.0)
        for _ in range(count)
    ]


def test_a_worse_start_is_hardly_ever_written() -> None:
    """Twelve candidates that are all worse than Θ0, at two sizes of the noise."""
    for spread in (0.5, 2.0):
        found = [
            World({name: -abs(value) for name, value in world.values.items()}, 1.0)
            for world in worlds(120, spread, seed=1)
        ]
        assert simulate(found, Settings(40), seed=2).worse < 0.05


def test_one_that_is_clearly_better_is_found() -> None:
    """By two standard deviations of one paired difference, which is √2 of a measure's noise."""
    better = {BASE: 0.0, "c0": 2 * 2**0.5} | {f"c{k}": 0.0 for k in range(1, 12)}
    assert simulate([World(better, 1.0)] * 120, Settings(40), seed=3).best >= 0.8


def test_a_rate_that_is_too_low_for_the_base_is_no_difference_once_it_is_tuned() -> None:
    """A start whose best rate is another one, and that is as good as Θ0 at it."""
    peak = {BASE: 4.0, "shrunk": 2.0}
    generator = np.random.default_rng(4)

    def value(trial: Trial) -> float:
        rate = float(dict(trial.arm.values).get("lr", 2.0))
        of = peak.get(trial.arm.start, 4.0)
        return -((np.log2(rate) - np.log2(of)) ** 2) + 0.2 * float(generator.standard_normal())

    untuned = sum(
        follow(search(["shrunk"], [()], Settings(20)), value)[0].is_better for _ in range(40)
    )
    grid = [(("lr", text),) for text in ("1", "2", "4", "8")]
    tuned = sum(
        follow(search(["shrunk"], grid, Settings(60)), value)[0].is_better for _ in range(40)
    )
    assert untuned >= 36
    assert tuned <= 4
