"""How KNOWN is trained. This module does not import torch, so the command line may import it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from know_cli.known.preparation import Preparation


class Target(str, Enum):
    """What KNOWN is taught to predict from a window.

    ``RETRODICTION``: the session before the window in the chain, which trained on 1/r times the
    data of the window's newest session (the paper).
    ``CONTINUATION``: Θ0 trained further on 1/r times its data.
    """

    RETRODICTION = "retrodiction"
    CONTINUATION = "continuation"


class Loss(str, Enum):
    """Mean absolute error, mean squared error, or Huber's loss between the two (with δ = 1)."""

    L1 = "l1"
    L2 = "l2"
    HUBER = "huber"


class Residuals(str, Enum):
    """The unit of errors.

    ``RAW``: that of the parameters (the paper).
    ``SCALED``: each trajectory's own mean |θ0 − θ_target| after that number of steps, so that
    trajectories that move far do not dominate the others.
    ``SPREAD``: each window's largest |θk − θ0|, so that all parameters count alike. A target
    more than twice that distance from θ0 is moved to twice that distance, since a window that
    hardly moved cannot foretell a leap.
    """

    RAW = "raw"
    SCALED = "scaled"
    SPREAD = "spread"


@dataclass(frozen=True)
class Settings:
    """How KNOWN is trained.

    Attributes:
        target: what it learns to predict.
        checkpoints: S, the length of a window.
        preparation: of windows.
        factor: whether KNOWN has a second output, a factor on θ0; see
            :class:`~know_cli.known.module.Known`.
        steps: how many steps it is trained through: after each step its prediction enters the
            window, and the errors of all steps count alike.
        loss: what is minimised.
        residuals: the unit of errors.
        penalised: whether the paper's L1 penalties on weights are added.
        epochs: passes over the training windows of a kind.
        batch_rows: windows per step.
        learning_rate: Adam's initial one; it falls to 0 along half a cosine.
        averaging: decay of an exponential moving average of KNOWN's weights over the training
            steps, which becomes the result; 0 keeps the last weights themselves.
        seed: of the split, the initial weights and the order of the windows.
        holdout: share of the trajectories that is held out for evaluation.
        held_out_architectures: names of architectures that are never trained on.
        held_out_data_sets: names of data sets that are never trained on.
        held_out_regimes: names of regimes that are never trained on.
        rows_per_tensor: see :func:`~know_cli.meta.windows.collect_windows`.
    """

    target: Target
    checkpoints: int = 5
    preparation: Preparation = Preparation.RAW
    factor: bool = False
    steps: int = 1
    loss: Loss = Loss.L1
    residuals: Residuals = Residuals.RAW
    penalised: bool = True
    epochs: int = 20
    batch_rows: int = 4096
    learning_rate: float = 1e-3
    averaging: float = 0.0
    seed: int = 0
    holdout: float = 0.2
    held_out_architectures: tuple[str, ...] = ()
    held_out_data_sets: tuple[str, ...] = ()
    held_out_regimes: tuple[str, ...] = ()
    rows_per_tensor: int = 1000

    def to_json(self) -> dict[str, Any]:
        """All settings in plain types; the factor only where there is one.

        So manifests, and what is kept of a training, are without it what they always were.
        """
        return {
            key: value.value if isinstance(value, Enum) else value
            for key, value in asdict(self).items()
            if key != "factor" or value
        }
