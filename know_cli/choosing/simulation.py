"""Searches with measures whose true values are known: how often the choice is right.

No network is trained. A measure is the arm's true value, plus noise that a seed gives to all arms
alike (such as the order of the data), plus noise of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from know_cli.choosing.search import BASE, Arm, Outcome, Procedure, Settings, Trial, search


@dataclass(frozen=True)
class World:
    """True values, and the noise of a measure.

    Attributes:
        values: start → true value; Θ0's is under :data:`~know_cli.choosing.search.BASE`. What has
            no value, such as the random direction, has Θ0's.
        noise: standard deviation of a measure's own noise.
        shared: standard deviation of the noise that all measures of a seed share.
    """

    values: Mapping[str, float]
    noise: float
    shared: float = 0.0

    def value(self, arm: Arm) -> float:
        """The true value of an arm."""
        return self.values.get(arm.start, self.values[BASE])


def run(procedure: Procedure, world: World, generator: np.random.Generator) -> Outcome:
    """Run a search in a world.

    Args:
        procedure: from :func:`~know_cli.choosing.search.search`.
        world: gives the measures.
        generator: of the noise.
    """
    shared: dict[int, float] = {}
    try:
        trials = next(procedure)
        while True:
            results: dict[Trial, float | None] = {}
            for trial in trials:
                if trial.seed not in shared:
                    shared[trial.seed] = world.shared * generator.standard_normal()
                own = world.noise * generator.standard_normal()
                results[trial] = world.value(trial.arm) + shared[trial.seed] + own
            trials = procedure.send(results)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


@dataclass(frozen=True)
class Scores:
    """What many searches of one sort came to.

    Attributes:
        searches: how many.
        worse: share that wrote a start that is truly worse than Θ0.
        better: share that wrote a start that is truly better than Θ0.
        best: share that wrote the truly best start.
        loss: mean of the best true value less that of what was written.
        loss_equal: the same of measuring all equally often and keeping the largest mean.
        loss_chosen: the same of the winner of choosing, confirmed or not.
    """

    searches: int
    worse: float
    better: float
    best: float
    loss: float
    loss_equal: float
    loss_chosen: float


def simulate(
    worlds: Sequence[World], settings: Settings, seed: int, *, noisy_shared: bool = True
) -> Scores:
    """Search once in each world.

    Args:
        worlds: each with the same starts.
        settings: of every search.
        seed: of the noise.
        noisy_shared: whether measuring all equally uses the same seeds for all starts, too.
    """
    generator = np.random.default_rng(seed)
    written, chosen, equal, best, base = [], [], [], [], []
    for world in worlds:
        names = [name for name in world.values if name != BASE]
        outcome = run(search(names, [()], settings), world, generator)
        name = outcome.winner.start if outcome.winner else BASE
        chosen.append(world.values[name])
        written.append(world.values[name if outcome.is_better else BASE])
        equal.append(world.values[_largest_mean(world, settings.budget, generator, noisy_shared)])
        best.append(max(world.values.values()))
        base.append(world.values[BASE])
    top, start, wrote = np.array(best), np.array(base), np.array(written)
    return Scores(
        len(worlds),
        float(np.mean(wrote < start)),
        float(np.mean(wrote > start)),
        float(np.mean(wrote == top)),
        float(np.mean(top - wrote)),
        float(np.mean(top - np.array(equal))),
        float(np.mean(top - np.array(chosen))),
    )


def _largest_mean(
    world: World, budget: int, generator: np.random.Generator, noisy_shared: bool
) -> str:
    names = list(world.values)
    seeds = max(budget // len(names), 1)
    noise = world.noise * generator.standard_normal((seeds, len(names)))
    if not noisy_shared:
        noise = noise + world.shared * generator.standard_normal((seeds, len(names)))
    means = np.array([world.values[name] for name in names]) + noise.mean(axis=0)
    return names[int(means.argmax())]
