"""The setup of a collected trajectory: all that its seed decides before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from know_cli.checkpoints.metadata import Regime
from know_cli.errors import UsageError
from know_cli.lab.data import AFFINE, AUGMENTATIONS, DataSet
from know_cli.lab.data.parts import is_glyphs, meta_part
from know_cli.lab.zoo import ARCHITECTURES, Inputs, random_design
from know_cli.meta.training_setup import TrainingSetup, log_uniform

Start = Literal["fresh", "pretrained"]

#: Relative weights in drawing a data set: this one has the most to learn from.
_WEIGHTS = {"fashion-mnist": 4.0}
#: Relative weights in drawing an architecture: these give the most windows per second.
_ARCHITECTURE_WEIGHTS = {"cnn": 2.0, "resnet": 2.0, "mlp": 1.5}
_RATES = (0.3, 0.9)
_FEWEST_CLASSES, _MOST_CLASSES = 3, 10
#: Glyphs are hard to tell apart: with more classes, small networks learn little from few images.
_MOST_GLYPH_CLASSES = 5
_MOST_SESSIONS, _FEWEST_SESSIONS = 8, 5
_MOST_CONTINUATIONS = 3
_SAMPLES = (60, 1200)
#: With fewer glyphs or texts, small networks learn nothing that generalises.
_HARD_SAMPLES = (300, 1500)
#: The most-forgotten session has at least this many samples.
_LAST_SAMPLES = 8
#: Steps of session 0: enough to memorise so few samples, or deliberately too few.
_STEPS, _SHORT_STEPS = (200, 600), (60, 150)
_SHORT_SHARE = 0.12
#: Share of chains in which all sessions have the epochs and learning rate of session 0, as when
#: the same training function is called each time.
_SAME_SHARE = 0.3
_AUGMENTED_SHARE = 0.4
_EPOCHS = (3, 200)
_STARTS: tuple[Start | None, ...] = (None, "fresh", "pretrained")
_START_SHARES = (0.75, 0.125, 0.125)
#: Continuations on much more data get fewer epochs, so that their steps stay below this
#: multiple of session 0's.
_MOST_CONTINUED_STEPS = 1.0
#: These learn more slowly, and next to nothing by plain gradient descent in so few steps.
_TRANSFORMERS = ("vit", "pyramid", "text")
_TRANSFORMER_STEPS = 1.25
_LEARNING_RATES = {"adam": (5e-4, 4e-3), "sgd": (1e-2, 1e-1)}


@dataclass(frozen=True)
class Setup(TrainingSetup):
    """A forgetting to be collected.

    Attributes:
        rate: sampling rate from one session to the next.
        sessions: number of sessions, including session 0.
        continuations: number of larger data sets on which Θ0 is continued.
        start: what all sessions start from: fresh weights, or weights trained for a while on
            other samples of the same data set; None for a chain, where each session continues
            from the previous one.
        epochs: of session 0.
        later_epochs: share of these epochs in later sessions of a chain; from a common start
            they have as many as session 0, and its learning rate.
        continued_epochs: share of these epochs in the first continuation, whose number of steps
            Θ0 trained longer has, too; further continuations have no more.
        later_rate: share of this learning rate in later sessions of a chain and in
            continuations.
        schedule: see :func:`~know_cli.lab.fitting.fit`.
    """

    rate: float
    sessions: int
    continuations: int
    start: Start | None
    epochs: int
    later_epochs: float
    continued_epochs: float
    later_rate: float
    schedule: str

    @property
    def largest(self) -> int:
        """Number of samples of the largest data set on which Θ0 is continued."""
        return round(self.samples / self.rate**self.continuations)

    def continued(self, step: int) -> int:
        """Epochs of the continuation of Θ0 on 1/r^step times its samples."""
        share = min(self.continued_epochs, _MOST_CONTINUED_STEPS * self.rate**step)
        if step == 1:
            share = self.continued_epochs
        return max(round(share * self.epochs), 1)

    @property
    def longer_epochs(self) -> int:
        """Epochs on D0 that take as many steps as the first continuation."""
        return max(round(self.continued_epochs * self.epochs / self.rate), 1)


def draw_setup(
    seed: int,
    data_sets: Mapping[str, DataSet],
    architectures: Sequence[str] | None = None,
    regime: Regime | None = None,
) -> Setup:
    """Draw a trajectory's setup from its seed.

    Args:
        seed: not negative.
        data_sets: to choose from, by name; the draw depends on their names and sizes only.
        architectures: to choose from; None for all.
        regime: of the trajectory; None draws it, too.

    Raises:
        UsageError: an architecture is unknown, or fits none of the data sets.
    """
    generator = np.random.default_rng([seed, 1])
    names = sorted(architectures or ARCHITECTURES)
    suitable = {
        name: [key for key in sorted(data_sets) if data_sets[key].kind == _kind_of(name)]
        for name in names
    }
    for name, found in suitable.items():
        if not found:
            raise UsageError(
                f"architecture {name!r}: none of the data sets {', '.join(sorted(data_sets))} "
                "suits it"
            )
    architecture = _weighted(names, _ARCHITECTURE_WEIGHTS, generator)
    name = _weighted(suitable[architecture], _WEIGHTS, generator)
    data = data_sets[name]
    most = min(_MOST_GLYPH_CLASSES if is_glyphs(name) else _MOST_CLASSES, data.classes)
    count = int(generator.integers(min(_FEWEST_CLASSES, most), most + 1))
    classes = tuple(sorted(generator.permutation(data.classes)[:count].tolist()))
    pool = int(np.isin(meta_part(data).labels.numpy(), classes).sum())
    # With few samples a low rate would leave nothing for the last session.
    lowest = max(_RATES[0], (_LAST_SAMPLES / pool) ** (1 / _FEWEST_SESSIONS))
    rate = round(float(generator.uniform(lowest, _RATES[1])), 3)
    wanted = _HARD_SAMPLES if name == "text" or is_glyphs(name) else _SAMPLES
    samples, sessions, continuations = _sizes(rate, pool, wanted, generator)
    optimiser = str(generator.choice(["adam", "sgd"], p=[0.7, 0.3]))
    batch_size = int(generator.choice([16, 32, 64], p=[0.75, 0.2, 0.05]))
    short = generator.random() < _SHORT_SHARE
    steps = log_uniform(generator, *(_SHORT_STEPS if short else _STEPS))
    if architecture in _TRANSFORMERS:
        optimiser = "adam"
        steps *= _TRANSFORMER_STEPS
    epochs = round(steps / math.ceil(samples / batch_size))
    augmentations = [name for name in AUGMENTATIONS[data.kind] if name != AFFINE]
    augmented = generator.random() < _AUGMENTED_SHARE
    same = generator.random() < _SAME_SHARE
    later_epochs = round(float(generator.uniform(0.3, 1.0)), 3)
    later_rate = round(log_uniform(generator, 0.15, 1.0), 3)
    return Setup(
        seed=seed,
        design=random_design(architecture, Inputs(data.kind, data.shape), count, generator),
        data_set=name,
        classes=classes,
        samples=samples,
        rate=rate,
        sessions=sessions,
        continuations=continuations,
        start=_start(regime, generator),
        epochs=min(max(epochs, _EPOCHS[0]), _EPOCHS[1]),
        later_epochs=1.0 if same else later_epochs,
        continued_epochs=round(float(generator.uniform(0.5, 1.0)), 3),
        learning_rate=float(f"{log_uniform(generator, *_LEARNING_RATES[optimiser]):.3g}"),
        later_rate=1.0 if same else later_rate,
        batch_size=batch_size,
        optimiser=optimiser,
        weight_decay=float(generator.choice([0.0, 1e-4, 1e-2])),
        schedule=str(generator.choice(["constant", "cosine", "step"], p=[0.3, 0.4, 0.3])),
        augmentation=(
            augmentations[generator.integers(1, len(augmentations))] if augmented else "none"
        ),
    )


def _kind_of(architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"unknown architecture {architecture!r}; choose from {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture].kind


def _start(regime: Regime | None, generator: np.random.Generator) -> Start | None:
    shares = np.array(_START_SHARES)
    if regime is not None:
        chained = np.array([start is None for start in _STARTS])
        shares = np.where(chained == (regime is Regime.CHAIN), shares, 0)
    return _STARTS[generator.choice(len(_STARTS), p=shares / shares.sum())]


def _weighted(
    names: Sequence[str], weights: Mapping[str, float], generator: np.random.Generator
) -> str:
    """Draw one of the names; those without a weight have weight 1."""
    shares = np.array([weights.get(name, 1.0) for name in names])
    return names[generator.choice(len(names), p=shares / shares.sum())]


def _sizes(
    rate: float, pool: int, wanted_samples: tuple[int, int], generator: np.random.Generator
) -> tuple[int, int, int]:
    """|D0|, the number of sessions and that of continuations, as far as the data reach."""
    # Enough samples for the last of the fewest sessions, and few enough to continue Θ0 once.
    fewest = math.ceil(_LAST_SAMPLES / rate ** (_FEWEST_SESSIONS - 1))
    largest = math.floor(pool * rate)
    lowest = min(max(wanted_samples[0], fewest), largest)
    highest = min(max(wanted_samples[1], lowest), largest)
    samples = round(log_uniform(generator, lowest, highest))
    sessions = _FEWEST_SESSIONS
    wanted = _MOST_SESSIONS - int(generator.random() < 0.75)
    while sessions < wanted and samples * rate**sessions >= _LAST_SAMPLES:
        sessions += 1
    continuations = 1
    while continuations < _MOST_CONTINUATIONS and samples / rate ** (continuations + 1) <= pool:
        continuations += 1
    return samples, sessions, continuations
