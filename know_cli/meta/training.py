"""Fits KNOWN to windows (the paper's section on meta-training), and makes a bundle of it."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli import __version__
from know_cli.errors import KnowError, UsageError
from know_cli.forgetting.recorder import derived_seed
from know_cli.hypermodel import Bundle, Known, Preparation
from know_cli.hypermodel.known import initialise, penalty
from know_cli.kinds import Kind
from know_cli.meta.figures import Figures, measure
from know_cli.meta.series import KINDS, Floats
from know_cli.meta.windows import Collection, Target, Windows

#: Rows that one forward pass without gradients takes at a time.
_CHUNK = 1 << 16


class Loss(str, Enum):
    """Mean absolute or mean squared error."""

    L1 = "l1"
    L2 = "l2"


class Residuals(str, Enum):
    """In which unit errors are counted.

    ``RAW``: that of the parameters (the paper).
    ``SCALED``: each trajectory's own mean |θ0 − θ_target|, so that trajectories that move far
    do not drown the others.
    """

    RAW = "raw"
    SCALED = "scaled"


@dataclass(frozen=True)
class Settings:
    """How KNOWN is trained.

    Attributes:
        target: what it is taught.
        checkpoints: S, the length of a window.
        preparation: what is done to a window first.
        loss: what is minimised.
        residuals: in which unit.
        penalised: whether the paper's L1 penalties on weights are added.
        epochs: passes over the training windows of a kind.
        batch_rows: windows a step.
        learning_rate: of Adam at the start; it falls to 0 along half a cosine.
        seed: of the split, the initial weights and the order of the windows.
        holdout: share of the trajectories that it is judged by, and never fitted to.
        rows_per_tensor: see :func:`~know_cli.meta.windows.collect_windows`.
    """

    target: Target
    checkpoints: int = 5
    preparation: Preparation = Preparation.RAW
    loss: Loss = Loss.L1
    residuals: Residuals = Residuals.RAW
    penalised: bool = True
    epochs: int = 20
    batch_rows: int = 4096
    learning_rate: float = 1e-3
    seed: int = 0
    holdout: float = 0.2
    rows_per_tensor: int = 1000


@dataclass(frozen=True)
class Fit:
    """What one kind's training came to.

    Attributes:
        known: the best KNOWN of all epochs by its held-out loss.
        epoch: the epoch it is from, counted from 1.
        losses: training loss and held-out loss of each epoch, without penalties.
        figures: on the held-out windows.
    """

    known: Known
    epoch: int
    losses: list[tuple[float, float]]
    figures: Figures


#: Told of each epoch: kind, epoch from 1, training loss, held-out loss.
Report = Callable[[Kind, int, float, float], None]


def split(trajectories: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide trajectories, by number, into those for training and those held out.

    Raises:
        UsageError: one side would be empty.
    """
    count = round(holdout * trajectories)
    if not 0 < count < trajectories:
        raise UsageError(
            f"{trajectories} trajectories cannot be split with a share of {holdout:g} held out: "
            "at least one is needed on each side; record more with 'know forget'"
        )
    order = np.random.default_rng([seed, 1]).permutation(trajectories)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())


def train_bundle(
    collection: Collection,
    settings: Settings,
    report: Report = lambda kind, epoch, training, held_out: None,
) -> tuple[Bundle, dict[Kind, Figures]]:
    """Train the three KNOWN of a bundle, one after the other.

    The same windows and settings give the same bundle on one machine with one number of
    threads.

    Args:
        collection: windows for the target, S and rows a tensor of the settings.
        settings: how to train.
        report: is told of each epoch.

    Returns:
        The bundle, whose manifest tells of data, settings, losses, versions and figures, and
        the figures of each kind.

    Raises:
        UsageError: there are too few trajectories, or a kind has no windows.
        KnowError: the training diverges.
    """
    training, held_out = split(len(collection.trajectories), settings.holdout, settings.seed)
    fits: dict[Kind, Fit] = {}
    for kind in KINDS:
        windows = collection.windows[kind]
        fits[kind] = fit(kind, windows.of(training), windows.of(held_out), settings, report)
    bundle = Bundle(
        {kind: found.known.state_dict() for kind, found in fits.items()},
        settings.checkpoints,
        settings.preparation,
        settings.target.value,
        _manifest(collection, settings, fits, training, held_out),
    )
    return bundle, {kind: found.figures for kind, found in fits.items()}


def fit(
    kind: Kind,
    training: Windows,
    held_out: Windows,
    settings: Settings,
    report: Report = lambda kind, epoch, training, held_out: None,
) -> Fit:
    """Train KNOWN for one kind; see :func:`train_bundle`."""
    for windows, name in ((training, "training"), (held_out, "held-out")):
        if not len(windows):
            raise UsageError(
                f"the {name} trajectories have no windows of kind {kind.value}; record models "
                "that have convolutions, dense layers and biases"
            )
    generator = torch.Generator().manual_seed(
        derived_seed(settings.seed, 2, KINDS.index(kind)) % 2**32
    )
    known = Known(settings.checkpoints, settings.preparation)
    initialise(known, generator)
    inputs, targets, weights = _tensors(training, settings)
    adam = torch.optim.Adam(known.parameters(), settings.learning_rate)
    batches = math.ceil(len(targets) / settings.batch_rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs * batches)
    best, best_loss, best_epoch = copy.deepcopy(known.state_dict()), math.inf, 0
    losses: list[tuple[float, float]] = []
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        order = torch.randperm(len(targets), generator=generator)
        for chosen in torch.split(order, settings.batch_rows):
            residuals = (known(inputs[chosen]) - targets[chosen]) * weights[chosen]
            loss = _mean(residuals, settings.loss)
            total += float(loss.detach()) * len(chosen)
            adam.zero_grad()
            (loss + penalty(known) if settings.penalised else loss).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
        training_loss, held_out_loss = total / len(targets), _loss(known, held_out, settings)
        if not (math.isfinite(training_loss) and math.isfinite(held_out_loss)):
            raise KnowError(
                f"training of kind {kind.value} diverged in epoch {epoch}; lower --learning-rate"
            )
        losses.append((training_loss, held_out_loss))
        if held_out_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(known.state_dict()), held_out_loss, epoch
        report(kind, epoch, training_loss, held_out_loss)
    known.load_state_dict(best)
    known.eval()
    figures = measure(predict(known, held_out.windows), held_out, training)
    return Fit(known, best_epoch, losses, figures)


def predict(known: Known, windows: Floats) -> Floats:
    """KNOWN's answers ``[rows]`` float32 to windows ``[rows, S]`` float32."""
    with torch.inference_mode():
        parts = [known(part) for part in torch.split(torch.from_numpy(windows), _CHUNK)]
    answers: Floats = torch.cat(parts).numpy()
    return answers


def _tensors(windows: Windows, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and what each residual is multiplied with."""
    weights = np.ones(len(windows), dtype=np.float32)
    if settings.residuals is Residuals.SCALED:
        distance = np.abs(windows.windows[:, -1] - windows.targets)
        sums = np.bincount(windows.trajectory, distance)
        rows = np.bincount(windows.trajectory)
        means = (sums / np.maximum(rows, 1))[windows.trajectory]
        weights = np.divide(1, means, out=np.zeros_like(means), where=means > 0).astype(np.float32)
    return (
        torch.from_numpy(windows.windows),
        torch.from_numpy(windows.targets),
        torch.from_numpy(weights),
    )


def _mean(residuals: Tensor, loss: Loss) -> Tensor:
    return residuals.abs().mean() if loss is Loss.L1 else residuals.square().mean()


def _loss(known: Known, windows: Windows, settings: Settings) -> float:
    _, targets, weights = _tensors(windows, settings)
    answers = torch.from_numpy(predict(known, windows.windows))
    return float(_mean((answers - targets) * weights, settings.loss))


def _manifest(
    collection: Collection,
    settings: Settings,
    fits: dict[Kind, Fit],
    training: list[int],
    held_out: list[int],
) -> dict[str, Any]:
    used = collection.trajectories
    rates = [trajectory.rate for trajectory in used]
    return {
        "settings": {
            key: value.value if isinstance(value, Enum) else value
            for key, value in asdict(settings).items()
        },
        "data": {
            "functions": sorted({trajectory.function for trajectory in used}),
            "rates": [min(rates), max(rates)],
            "training": [used[number].identity for number in training],
            "held_out": [used[number].identity for number in held_out],
            "rows": {kind.value: len(collection.windows[kind]) for kind in KINDS},
        },
        "figures": {
            kind.value: {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in asdict(found.figures).items()
            }
            for kind, found in fits.items()
        },
        "losses": {
            kind.value: {
                "best_epoch": found.epoch,
                "training": [float(f"{loss:.5g}") for loss, _ in found.losses],
                "held_out": [float(f"{loss:.5g}") for _, loss in found.losses],
            }
            for kind, found in fits.items()
        },
        "versions": {
            "know-predict": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
