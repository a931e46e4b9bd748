"""What a task of the evaluation consists of."""

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
        batch_size: samples a step.
        weight_decay: of AdamW.
        schedule: how the learning rate runs.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 1e-4
    schedule: str = "step"


@dataclass(frozen=True)
class Downstream:
    """A downstream condition, before it has its data.

    Attributes:
        size: training examples.
        epochs: passes over them.
        learning_rate: the initial one; it falls along a cosine.
        repetitions: fine-tunings, each with examples, order and head of its own; their mean
            counts.
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
    """A downstream condition with its data.

    Attributes:
        name: for tables, such as ``50 images``.
        downstream: how many examples are drawn for each fine-tuning, and how it goes.
        pool: what they are drawn from.
        test: what the fine-tuned network is measured on; shares no example with ``pool``.
    """

    name: str
    downstream: Downstream
    pool: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class Problem:
    """A task with one seed, ready for training.

    Attributes:
        pool: D(−1), the data that the oracle has; half of it, drawn by seed, is D0.
        test: examples of the same kind that no session trains on.
        build: the network to pre-train, its initial weights from a seed. Parameters that need
            no gradient are no part of a checkpoint.
        build_downstream: the network to fine-tune, from a seed.
        fresh: names of modules whose weights are not transferred.
        cells: the downstream conditions.
        pretraining_measure: what is measured on ``test``.
        measure: what is measured on the cells' test examples.
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
    """A pre-training and what it is used for; all that decides it but the seed.

    Attributes:
        name: for the command line.
        title: what is transferred to what, with which network.
        samples: |D0|.
        recipe: of every session, of the oracles and of the longer training.
        downstream: the conditions.
        tested: test examples, at most.
        version: to be raised with every change of what ``prepare`` gives.
        large: whether it takes hours, so that it runs only where it is asked for by name.
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
        """Names of the data sets of :mod:`know_cli.lab.data` that it needs."""

    @abstractmethod
    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw a seed's data.

        Raises:
            UsageError: data are missing or corrupt.
        """

    @property
    def largest(self) -> int:
        """|D(−1)|."""
        return round(self.samples / RATE)

    def definition(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {"family": type(self).__name__, **asdict(self)}


def train(model: nn.Module, examples: Examples, recipe: Recipe, seed: int) -> None:
    """Train a network in place, and leave it in evaluation mode.

    Args:
        model: maps inputs to ``[n, classes, …]``.
        examples: what is trained on.
        recipe: how.
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
    """Indices below ``n`` in an order that the seed decides, int64 ``[n]``."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(list(seed)).permutation(n))
