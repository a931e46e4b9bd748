"""What every collected trajectory has to say about the training that it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np

from know_cli.lab.zoo import Design

AnySetup = TypeVar("AnySetup", bound="TrainingSetup")


@dataclass(frozen=True)
class TrainingSetup:
    """A network and how it is trained; each kind of trajectory adds what it is recorded by.

    Attributes:
        seed: of the trajectory.
        design: of the network.
        data_set: name of the data set.
        classes: the data set's classes that belong to the task.
        samples: number of training samples, of a forgetting those of session 0: |D0|.
        batch_size: samples per step.
        optimiser: ``sgd`` with momentum, or ``adam``: Adam without weight decay, AdamW with.
        learning_rate: the highest one, of a forgetting that of session 0.
        weight_decay: of the optimiser.
        augmentation: see :data:`~know_cli.lab.data.AUGMENTATIONS`.
    """

    seed: int
    design: Design
    data_set: str
    classes: tuple[int, ...]
    samples: int
    batch_size: int
    optimiser: str
    learning_rate: float
    weight_decay: float
    augmentation: str

    @property
    def largest(self) -> int:
        """Number of samples of the largest data set that anything is trained on."""
        return self.samples

    def training(self) -> dict[str, Any]:
        """These fields alone, to make the setup of another kind of trajectory with."""
        return {one.name: getattr(self, one.name) for one in fields(TrainingSetup)}

    def to_json(self) -> dict[str, Any]:
        """The setup in plain types."""
        return {**asdict(self), "design": self.design.to_json(), "classes": list(self.classes)}

    @classmethod
    def from_json(cls: type[AnySetup], stored: Mapping[str, Any]) -> AnySetup:
        """What :meth:`to_json` has written.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        design, classes = Design.from_json(stored["design"]), tuple(stored["classes"])
        return cls(**{**stored, "design": design, "classes": classes})


def log_uniform(generator: np.random.Generator, lowest: float, highest: float) -> float:
    """A number between two positive ones, whose logarithm is uniform."""
    return float(math.exp(generator.uniform(math.log(lowest), math.log(highest))))
