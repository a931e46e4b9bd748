"""The setup of a collected run: all that its seed decides before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from know_cli.lab.data import DataSet
from know_cli.lab.data.parts import meta_part
from know_cli.meta.setup import draw_setup
from know_cli.meta.training_setup import TrainingSetup, log_uniform

#: Annealed continuations, as shares of the steps before them.
ANNEALED = (0.05, 0.1, 0.2, 0.4)
_SAMPLES = (400, 4000)
#: Steps of the whole run, and the share of them after which the window ends, from barely trained
#: to converged.
_STEPS = (200, 1600)
_ENDS = (0.15, 1.0)
_FEWEST_CHECKPOINTS, _MOST_CHECKPOINTS = 2, 5
#: The annealed continuation of a brief record.
_BRIEF_ANNEALED = (0.2,)
#: Steps between checkpoints, as a share of those before the window's end.
_SPACINGS = (0.004, 0.12)
#: The window covers at most this share of the steps before its end.
_MOST_COVERED = 0.6
_WARM_UPS = (0.0, 0.1)
_CONSTANT_SHARE = 0.6
#: What a slowly falling rate has left at the end of the run.
_LEFT = (0.2, 0.8)


@dataclass(frozen=True)
class RunSetup(TrainingSetup):
    """A run to be collected.

    Attributes:
        steps: of the whole run, which the schedule refers to.
        warm_up: steps in which the rate rises.
        left: share of the rate at the last step, to which it falls in a line; 1 is constant.
        end: step of the window's newest checkpoint.
        checkpoints: S, the number of checkpoints of the window.
        spacing: steps between them.
        brief: whether all that is recorded of what came after the window is one annealing.
    """

    steps: int
    warm_up: int
    left: float
    end: int
    checkpoints: int
    spacing: int
    brief: bool = False

    @property
    def window(self) -> list[int]:
        """Steps of the window's checkpoints, the oldest first."""
        return [self.end - self.spacing * back for back in range(self.checkpoints - 1, -1, -1)]

    @property
    def future(self) -> list[int]:
        """Steps of the checkpoints after the window, as many and as far apart."""
        if self.brief:
            return []
        return [self.end + self.spacing * ahead for ahead in range(1, self.checkpoints + 1)]

    @property
    def shares(self) -> tuple[float, ...]:
        """The annealed continuations, as shares of the steps before them."""
        return _BRIEF_ANNEALED if self.brief else ANNEALED

    def annealed(self, share: float) -> int:
        """Steps of the annealed continuation by a share of :data:`ANNEALED`."""
        return max(round(share * self.end), 1)

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step of the run."""
        risen = min((step + 1) / (self.warm_up + 1), 1.0)
        return risen * max(1 - (1 - self.left) * step / self.steps, 0.0)


def draw_run_setup(
    seed: int,
    data_sets: Mapping[str, DataSet],
    architectures: Sequence[str] | None = None,
    *,
    checkpoints: int | None = None,
    brief: bool = False,
) -> RunSetup:
    """Draw a run's setup from its seed.

    Network, data set, classes, batch size, optimiser, rate, weight decay and augmentation are
    drawn as for a forgetting with the same seed.

    Args:
        seed: not negative.
        data_sets: to choose from, by name; the draw depends on their names and sizes only.
        architectures: to choose from; None for all.
        checkpoints: of the window; None draws them.
        brief: see :class:`RunSetup`.

    Raises:
        UsageError: an architecture is unknown, or fits none of the data sets.
    """
    shared = draw_setup(seed, data_sets, architectures)
    generator = np.random.default_rng([seed, 2])
    part = meta_part(data_sets[shared.data_set])
    pool = int(np.isin(part.labels.numpy(), shared.classes).sum())
    samples = min(round(log_uniform(generator, *_SAMPLES)), pool)
    steps = round(log_uniform(generator, *_STEPS))
    end = max(round(steps * float(generator.uniform(*_ENDS))), 20)
    drawn = int(generator.integers(_FEWEST_CHECKPOINTS, _MOST_CHECKPOINTS + 1))
    checkpoints = checkpoints or drawn
    spacing = max(round(end * log_uniform(generator, *_SPACINGS)), 1)
    widest = max(int(_MOST_COVERED * end / (checkpoints - 1)), 1)
    constant = generator.random() < _CONSTANT_SHARE
    left = round(float(generator.uniform(*_LEFT)), 3)
    return RunSetup(
        **{**shared.training(), "samples": samples},
        steps=max(steps, end),
        warm_up=round(end * float(generator.uniform(*_WARM_UPS))),
        left=1.0 if constant else left,
        end=end,
        checkpoints=checkpoints,
        spacing=min(spacing, widest),
        brief=brief,
    )
