"""How a hyper-model is taught through networks; imports no torch, so that the command line may."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from know_cli.known.preparation import Preparation

#: Examples that a step of fine-tuning on another task takes.
DOWNSTREAM_BATCH = 32
#: How many it may take them from, unless other numbers are given.
DOWNSTREAM_EXAMPLES = (200,)


class HyperModel(str, Enum):
    """Values of ``--model``."""

    SETTLE = "settle"
    KNOWN = "known"


#: Adam's rate where none is given, by hyper-model.
NETWORK_RATES = {HyperModel.SETTLE: 1e-2, HyperModel.KNOWN: 3e-3}


@dataclass(frozen=True)
class NetworkSettings:
    """How a hyper-model is taught through networks.

    Attributes:
        checkpoints: S.
        model: which hyper-model.
        preparation, factor: see :class:`~know_cli.known.module.Known`; of KNOWN alone.
        predicted_steps: KNOWN is taught by predictions of one to so many steps, drawn for each
            network and step of its own training.
        hidden, width: see :class:`~know_cli.settle.module.Settle`; of settle alone.
        roles: whether settle reads the role of each tensor.
        steps: of its own training.
        runs: per step.
        batch: samples per run and step.
        learning_rate: Adam's, which falls to 0 along half a cosine.
        distance: weight of the squared distance to the window's target, where it has one: of runs
            and branches to the annealed weights, as a share of that of the average; of forgettings
            to those after training on more data, as a share of that of the window's newest
            checkpoint.
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
    model: HyperModel = HyperModel.SETTLE
    preparation: Preparation = Preparation.SPREAD
    factor: bool = False
    predicted_steps: int = 1
    hidden: int = 16
    width: int = 0
    roles: bool = False
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
        """Plain types: what is of the other hyper-model is left out.

        So is what was added later where it is not asked for, so that a manifest is as it was, and
        what was kept of a training is gone on with.
        """
        found = asdict(self) | {"downstream_examples": list(self.downstream_examples)}
        if self.model is HyperModel.SETTLE:
            others: tuple[str, ...] = ("model", "preparation", "factor", "predicted_steps")
        else:
            others = ("hidden", "width", "roles")
            found |= {"model": self.model.value, "preparation": self.preparation.value}
        for name in others:
            del found[name]
        if self.downstream_examples == DOWNSTREAM_EXAMPLES:
            del found["downstream_examples"]
        if self.model is HyperModel.SETTLE and not self.roles:
            del found["roles"]
        return found
