"""How the hyper-model settle is taught; imports no torch, so that the command line may."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class NetworkSettings:
    """How the hyper-model settle is taught.

    Attributes:
        checkpoints: S.
        hidden, width: see :class:`~know_cli.settle.module.Settle`.
        steps: of its own training.
        runs: per step.
        batch: samples per run and step.
        learning_rate: Adam's, which falls to 0 along half a cosine.
        distance: weight of the squared distance to the annealed weights, where the window's
            newest checkpoint was annealed, as a share of that of the average.
        downstream: weight of the logarithm of the cross entropy on another task, see
            :func:`~know_cli.meta.network_downstream.loss_downstream`.
        downstream_steps: of fine-tuning before that is taken.
        calibrated: divide logits by the temperature that suits them best first, so that nothing is
            gained by being less sure of the same answers.
        batch_statistics: normalise by each batch instead of by running statistics.
        seed: of all random numbers.
    """

    checkpoints: int = 5
    hidden: int = 16
    width: int = 0
    steps: int = 200
    runs: int = 8
    batch: int = 128
    learning_rate: float = 1e-2
    distance: float = 0.0
    downstream: float = 0.0
    downstream_steps: int = 10
    calibrated: bool = False
    batch_statistics: bool = False
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)
