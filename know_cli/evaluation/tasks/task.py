"""The parts of an evaluation task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.measures import Measure
from know_cli.lab.fitting import fit

#: |D(k + 1)| / |D(k)| in all tasks.
RATE = 0.5


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; see :func:`~know_cli.lab.fitting.fit`.

    Attributes:
        epochs: passes over the data.
        learning_rate: the initial one.
        batch_size: samples per step.
        weight_decay: of AdamW.
        schedule: of the learning rate.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 1e-4
    schedule: str = "step"


@dataclass(frozen=True)
class Downstream:
    """A downstream condition, without its data.

    Attributes:
        size: number of training examples.
        epochs: passes over them.
        learning_rate: the initial one; it falls to 0 along half a cosine.
        repetitions: fine-tunings, each with its own examples, order and head; the result is their
            mean.
    """

    size: int
    epochs: int
    learning_rate: float = 1e-3
    repetitions: int = 2

    @property
    def recipe(self) -> Recipe:
        """How a network is fine-tuned."""
        return Recipe(self.epochs, self.learning_rate, schedule="cosine")


@dataclass(frozen=True, eq=False)
class Cell:
    """A downstream condition, with its data.

    Attributes:
        name: for tables, such as ``50 images``.
        downstream: size and recipe of the fine-tuning.
        pool: examples that the training examples are drawn from.
        test: examples that the fine-tuned network is measured on, none of which is in ``pool``.
    """

    name: str
    downstream: Downstream
    pool: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class Problem:
    """A task with one seed, ready for training.

    Attributes:
        pool: D(−1), the data of the oracle; the seed draws D0 as half of it.
        test: examples of the same kind that no session trains on.
        build: makes the network to pre-train, with initial weights from a seed. Parameters
            without a gradient are not part of checkpoints.
        build_downstream: makes the network to fine-tune, from a seed.
        fresh: names of modules whose weights are not transferred.
        cells: the downstream conditions.
        pretraining_measure: measured on ``test``.
        measure: measured on the cells' test examples.
    """

    pool: Examples
    test: Examples
    build: Callable[[int], nn.Module]
    build_downstream: Callable[[int], nn.Module]
    fresh: tuple[str, ...]
    cells: tuple[Cell, ...]
    pretraining_measure: Measure
    measure: Measure


@dataclass(frozen=True)
class Task(ABC):
    """A pre-training and its downstream conditions: everything that determines them but the seed.

    Attributes:
        name: for the command line.
        title: what is transferred to what, with which network.
        samples: |D0|.
        recipe: of every session, the oracles and the longer training.
        downstream: the conditions.
        tested: the most test examples.
        version: to be raised with every change of what ``prepare`` returns.
        large: whether it takes hours, so it runs only if it is requested by name.
    """

    name: str
    title: str
    samples: int
    recipe: Recipe
    downstream: tuple[Downstream, ...]
    tested: int = 1000
    version: int = 1
    large: bool = False

    @property
    @abstractmethod
    def data_sets(self) -> tuple[str, ...]:
        """Names of the required data sets of :mod:`know_cli.lab.data`."""

    @abstractmethod
    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw a seed's data.

        Raises:
            UsageError: a data set is missing or corrupt.
        """

    @property
    def largest(self) -> int:
        """|D(−1)|."""
        return round(self.samples / RATE)

    def definition(self) -> dict[str, Any]:
        """The task in plain types."""
        return {"family": type(self).__name__, **asdict(self)}


def train(model: nn.Module, examples: Examples, recipe: Recipe, seed: int) -> None:
    """Train a network in place and leave it in evaluation mode.

    Args:
        model: maps inputs to ``[n, classes, …]``.
        examples: to train on.
        recipe: of the training.
        seed: of the order of the examples and of dropout.
    """
    fit(
        model,
        examples.inputs,
        examples.targets,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        least_batch=2,  # BatchNorm needs them
        seed=seed,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
    )


def permutation(n: int, *seed: int) -> Tensor:
    """Indices below ``n`` in an order that the seed determines, int64 ``[n]``."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(list(seed)).permutation(n))
