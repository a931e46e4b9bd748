"""What a user can set of a prediction; free of torch, so that the command line may import it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from know_cli.kinds import (
    Override,
)

#: The most steps that are predicted.
MAX_STEPS = 8


class NormMode(str, Enum):
    """What happens to normalisation layers.

    ``AVERAGE`` is for methods that average: weights and biases are averaged, too, and running
    statistics are those of the averaged distributions.
    """

    COPY = "copy"
    PREDICT = "predict"
    RESET = "reset"
    RESCALE = "rescale"
    AVERAGE = "average"


class FrozenMode(str, Enum):
    """What happens to tensors, and to single elements, that are the same in all checkpoints."""

    COPY = "copy"
    PREDICT = "predict"


@dataclass(frozen=True)
class Settings:
    """What the user wants of a prediction.

    Attributes:
        steps: how many are predicted, 1 to 8; each method defines what a step is.
        norm: see :class:`NormMode`; None is the method's own, which a
            :class:`~know_cli.prediction.request.Request` puts in its place.
        frozen: see :class:`FrozenMode`.
        overrides: kinds that the user sets.
        allow_nonfinite: take Θ0's value where an input or a prediction is not finite, instead of
            refusing it.
        max_memory: bytes of working memory.
        threads: worker threads on a CPU.
    """

    steps: int = 1
    norm: NormMode | None = None
    frozen: FrozenMode = FrozenMode.COPY
    overrides: tuple[Override, ...] = ()
    allow_nonfinite: bool = False
    max_memory: int = 1 << 30
    threads: int = 1
