"""How KNOWN is trained; free of torch, so that the command line may import it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from know_cli.known.preparation import Preparation


class Target(str, Enum):
    """What KNOWN is taught to predict from a window.

    ``RETRODICTION``: the session before the window in the chain, trained on 1/r times the data
    of the window's newest (the paper).
    ``CONTINUATION``: Θ0 continued on 1/r times its data.
    """

    RETRODICTION = "retrodiction"
    CONTINUATION = "continuation"


class Loss(str, Enum):
    """Mean absolute error, mean squared error, or between the two (Huber, with a distance of 1)."""

    L1 = "l1"
    L2 = "l2"
    HUBER = "huber"


class Residuals(str, Enum):
    """In which unit errors are counted.

    ``RAW``: that of the parameters (the paper).
    ``SCALED``: each trajectory's own mean |θ0 − θ_target| for that number of steps, so that
    trajectories that move far do not drown the others.
    ``SPREAD``: each window's largest |θk − θ0|, so that every parameter counts alike; a target
    farther from θ0 than twice that counts as one that far, as a window that hardly moved says
    nothing of a leap.
    """

    RAW = "raw"
    SCALED = "scaled"
    SPREAD = "spread"


@dataclass(frozen=True)
class Settings:
    """How KNOWN is trained.

    Attributes:
        target: what it is taught.
        checkpoints: S, the length of a window.
        preparation: what is done to a window first.
        steps: how many steps it is trained through: beyond the first, its answer is put into
            the window, and the error after each step counts alike.
        loss: what is minimised.
        residuals: in which unit.
        penalised: whether the paper's L1 penalties on weights are added.
        epochs: passes over the training windows of a kind.
        batch_rows: windows a step.
        learning_rate: of Adam at the start; it falls to 0 along half a cosine.
        averaging: decay of the exponential moving average of KNOWN's weights over the steps of
            training that is kept in the end; 0 keeps the last weights themselves.
        seed: of the split, the initial weights and the order of the windows.
        holdout: share of the trajectories that it is judged by, and never fitted to.
        held_out_architectures: names of those that are never trained on.
        held_out_data_sets: names of those that are never trained on.
        held_out_regimes: names of those that are never trained on.
        rows_per_tensor: see :func:`~know_cli.meta.windows.collect_windows`.
    """

    target: Target
    checkpoints: int = 5
    preparation: Preparation = Preparation.RAW
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
        """All of them as JSON takes them."""
        return {
            key: value.value if isinstance(value, Enum) else value
            for key, value in asdict(self).items()
        }
