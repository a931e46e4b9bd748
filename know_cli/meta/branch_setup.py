"""The setup of collected branches: all that their seed decides before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from know_cli.lab.data import DataSet
from know_cli.meta.run_setup import draw_run_setup
from know_cli.meta.training_setup import TrainingSetup, log_uniform

#: Checkpoints of branches, Θ0 among them, unless another number is given.
CHECKPOINTS = 6
#: Steps of a branch, as a share of those before it.
_SHARES = (0.05, 0.5)
#: How often the branches have a random part of the samples each, and its share.
_PARTS, _PART = 0.5, 0.5


@dataclass(frozen=True)
class BranchSetup(TrainingSetup):
    """Branches to be collected.

    Attributes:
        warm_up: steps in which the rate rises; then it is constant.
        end: steps of Θ0.
        checkpoints: S, Θ0 and the branches that go on from it.
        steps: of each branch.
        fraction: share of the samples that a branch is trained on, drawn for each; 1.0 is all, in
            an order of its own.
    """

    warm_up: int
    end: int
    checkpoints: int
    steps: int
    fraction: float

    @property
    def branches(self) -> int:
        """Number of branches."""
        return self.checkpoints - 1

    @property
    def every_step(self) -> int:
        """Steps of all branches together."""
        return self.branches * self.steps

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step."""
        return min((step + 1) / (self.warm_up + 1), 1.0)


def draw_branch_setup(
    seed: int,
    data_sets: Mapping[str, DataSet],
    architectures: Sequence[str] | None = None,
    *,
    checkpoints: int = CHECKPOINTS,
) -> BranchSetup:
    """Draw the setup of branches from their seed.

    Θ0 is what a run of the same seed is at the end of its window, from barely trained to
    converged, but at a rate that does not fall.

    Args:
        seed: not negative.
        data_sets: to choose from, by name; the draw depends on their names and sizes only.
        architectures: to choose from; None for all.
        checkpoints: S, Θ0 and the branches; nothing else depends on it.

    Raises:
        UsageError: an architecture is unknown, or fits none of the data sets.
    """
    run = draw_run_setup(seed, data_sets, architectures)
    generator = np.random.default_rng([seed, 3])
    steps = round(run.end * log_uniform(generator, *_SHARES))
    in_parts = generator.random() < _PARTS
    return BranchSetup(
        **run.training(),
        warm_up=run.warm_up,
        end=run.end,
        checkpoints=checkpoints,
        steps=max(steps, 1),
        fraction=_PART if in_parts else 1.0,
    )
