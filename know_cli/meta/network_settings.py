"""How the hyper-model settle is taught; imports no torch, so that the command line may."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Examples that a step of fine-tuning on another task takes.
DOWNSTREAM_BATCH = 32
#: How many it may take them from, unless other numbers are given.
DOWNSTREAM_EXAMPLES = (200,)


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
        distance: weight of the squared distance to the window's target, where it has one: of runs
            to the annealed weights, as a share of that of the average; of forgettings to those
            after training on more data, as a share of that of the window's newest checkpoint.
        downstream: weight of the logarithm of the cross entropy on another task, see
            :func:`~know_cli.meta.network_downstream.loss_downstream`.
        downstream_steps: of fine-tuning before that is taken.
        downstream_examples: how many examples these may use; of several numbers one is drawn for
            each network and step.
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
    downstream_examples: tuple[int, ...] = DOWNSTREAM_EXAMPLES
    calibrated: bool = False
    batch_statistics: bool = False
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain types.

        Without what was added later where it is not asked for, so that a manifest is as it was, and
        what was kept of a training is gone on with.
        """
        found = asdict(self) | {"downstream_examples": list(self.downstream_examples)}
        if self.downstream_examples == DOWNSTREAM_EXAMPLES:
            del found["downstream_examples"]
        return found
