"""Fits KNOWN to windows (the paper's section on meta-training) and makes a bundle of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints import open_checkpoint, save_checkpoint
from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.files import make_folder
from know_cli.forgetting.recorder import derived_seed
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import Bundle
from know_cli.known.module import Known, initialise, penalty, roll
from know_cli.meta.held_out import Table, evaluate, to_json
from know_cli.meta.kept import check_kept_folder, remove_kept_folder
from know_cli.meta.manifest import training_facts, versions
from know_cli.meta.scores import predict
from know_cli.meta.settings import Loss, Residuals, Settings
from know_cli.meta.split import split_collection
from know_cli.meta.windows import Collection, Windows

#: δ of the Huber loss, in the unit of the residuals.
_HUBER = 1.0
#: With residuals in units of spread, targets are clipped to this many spreads around θ0.
_FARTHEST = 2.0
_FIT = "know.fit"
_FILES = {kind: f"{kind.value}.safetensors" for kind in PREDICTED_KINDS}


@dataclass(frozen=True)
class Fit:
    """The outcome of one kind's training.

    Attributes:
        known: after the last epoch.
        losses: training loss and held-out loss of each epoch, without penalties. The held-out
            loss is only reported; nothing is chosen by it.
    """

    known: Known
    losses: list[tuple[float, float]]


#: Called after each epoch with the kind, the epoch from 1, the training and the held-out loss.
Report = Callable[[Kind, int, float, float], None]


def train_bundle(
    collection: Collection,
    settings: Settings,
    report: Report = lambda kind, epoch, training, held_out: None,
    *,
    partial: Path | None = None,
) -> tuple[Bundle, Table]:
    """Train the three KNOWN of a bundle, one after the other.

    The same windows, settings and number of threads give the same bundle on the same machine.

    Args:
        collection: windows for the target, S and rows per tensor of the settings, with targets
            for at least as many steps; scores are measured for all steps that have targets.
        settings: how to train.
        report: called after each epoch.
        partial: a folder that keeps each kind once it is trained, so that an interrupted run
            continues with the next kind; None keeps nothing.

    Returns:
        The bundle, whose manifest records data, settings, losses, versions and scores, and these
        scores.

    Raises:
        UsageError: there are too few trajectories, a kind has no windows, or the training diverges.
    """
    parts = split_collection(collection, settings)
    wanted = _identity(collection, settings)
    fits: dict[Kind, Fit] = {}
    for kind in PREDICTED_KINDS:
        file = None if partial is None else partial / _FILES[kind]
        found = None if file is None else _read_fit(file, wanted, settings)
        if found is None:
            windows = collection.windows[kind]
            training, held_out = windows.of(parts.training), windows.of(parts.all_held_out)
            found = fit(kind, training, held_out, settings, report)
            if file is not None:
                _save_fit(found, file, wanted)
        fits[kind] = found
    states = {kind: found.known.state_dict() for kind, found in fits.items()}
    bundle = Bundle(
        states,
        settings.checkpoints,
        settings.preparation,
        settings.target.value,
        training_facts(
            collection, settings, parts, {kind: found.losses for kind, found in fits.items()}
        ),
    )
    table = evaluate(bundle, collection, parts)
    # The key is part of the format of manifests.
    bundle.manifest["figures"] = to_json(table)
    return bundle, table


def check_partial(partial: Path) -> None:
    """Refuse a folder for what is kept that has anything else in it.

    Raises:
        OutputError: it has, or is no folder.
    """
    check_kept_folder(partial, _FILES.values(), _FIT)


def remove_partial(partial: Path) -> None:
    """Remove what was kept, once its bundle is written."""
    remove_kept_folder(partial, _FILES.values())


def fit(
    kind: Kind,
    training: Windows,
    held_out: Windows,
    settings: Settings,
    report: Report = lambda kind, epoch, training, held_out: None,
) -> Fit:
    """Train KNOWN for one kind; see :func:`train_bundle`.

    Raises:
        UsageError: there are no training or no held-out windows, or the training diverges.
    """
    for name, windows in (("training", training), ("held-out", held_out)):
        if not len(windows):
            raise UsageError(
                f"the {name} trajectories have no windows of kind {kind.value}; record networks "
                "that have convolutions, dense layers and biases"
            )
    generator = torch.Generator().manual_seed(
        derived_seed(settings.seed, 2, PREDICTED_KINDS.index(kind)) % 2**32
    )
    known = Known(settings.checkpoints, settings.preparation, factor=settings.factor)
    initialise(known, generator)
    inputs, targets, weights = _tensors(training, settings)
    adam = torch.optim.Adam(known.parameters(), settings.learning_rate)
    batches = math.ceil(len(inputs) / settings.batch_rows)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs * batches)
    average = _average(known, settings.averaging)
    kept: Known = known if average is None else average.module  # type: ignore[assignment]
    losses: list[tuple[float, float]] = []
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        order = torch.randperm(len(inputs), generator=generator)
        for chosen in torch.split(order, settings.batch_rows):
            answers = roll(known, inputs[chosen], settings.steps)
            loss = _mean(answers, targets[chosen], weights[chosen], settings.loss)
            total += float(loss.detach()) * len(chosen)
            adam.zero_grad()
            (loss + penalty(known) if settings.penalised else loss).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
            if average is not None:
                average.update_parameters(known)
        training_loss = total / len(inputs)
        held_out_loss = _loss(kept, held_out, settings)
        if not (math.isfinite(training_loss) and math.isfinite(held_out_loss)):
            raise UsageError(
                f"training of kind {kind.value} diverged in epoch {epoch}; lower --learning-rate"
            )
        losses.append((training_loss, held_out_loss))
        report(kind, epoch, training_loss, held_out_loss)
    return Fit(kept.eval(), losses)


def _average(known: Known, decay: float) -> torch.optim.swa_utils.AveragedModel | None:
    if not decay:
        return None
    rule = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return torch.optim.swa_utils.AveragedModel(known, multi_avg_fn=rule)


def _tensors(windows: Windows, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and the weight of each residual, which is 0 where there is no target."""
    wanted = windows.targets[:, : settings.steps]
    there = np.isfinite(wanted)
    targets = np.where(there, wanted, np.float32(0))
    weights = there.astype(np.float32)
    newest = windows.windows[:, -1:]
    if settings.residuals is Residuals.SCALED:
        distance = np.where(there, np.abs(newest - targets), 0)
        for step in range(settings.steps):
            sums = np.bincount(windows.trajectory, distance[:, step])
            rows = np.bincount(windows.trajectory, there[:, step])
            weights[:, step] *= _inverse(sums / np.maximum(rows, 1))[windows.trajectory]
    elif settings.residuals is Residuals.SPREAD:
        spread = np.abs(windows.windows - newest).max(axis=1, keepdims=True)
        weights *= _inverse(spread)
        targets = np.clip(targets, newest - _FARTHEST * spread, newest + _FARTHEST * spread)
    return torch.from_numpy(windows.windows), torch.from_numpy(targets), torch.from_numpy(weights)


def _inverse(values: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> Any:
    """1 / values, or 0 where they are 0, since nothing can be learned from what did not move."""
    return np.divide(1, values, out=np.zeros_like(values), where=values > 0).astype(np.float32)


def _mean(answers: Tensor, targets: Tensor, weights: Tensor, loss: Loss) -> Tensor:
    residuals = (answers - targets) * weights
    if loss is Loss.L1:
        values = residuals.abs()
    elif loss is Loss.L2:
        values = residuals.square()
    else:
        values = torch.nn.functional.huber_loss(
            residuals, torch.zeros_like(residuals), reduction="none", delta=_HUBER
        )
    # Entries without a target have weight 0 and do not count.
    return values.sum() / (weights != 0).sum().clamp(min=1)


def _loss(known: Known, windows: Windows, settings: Settings) -> float:
    _, targets, weights = _tensors(windows, settings)
    answers = torch.from_numpy(predict(known, windows.windows, settings.steps))
    return float(_mean(answers, targets, weights, settings.loss))


def _identity(collection: Collection, settings: Settings) -> str:
    """What must be unchanged for a kind that was kept to be used again, as JSON."""
    facts: Mapping[str, Any] = {
        "settings": settings.to_json(),
        "trajectories": [one.identity for one in collection.trajectories],
        "rows": {kind.value: len(collection.windows[kind]) for kind in PREDICTED_KINDS},
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return json.dumps(facts, sort_keys=True)


def _save_fit(found: Fit, file: Path, identity: str) -> None:
    make_folder(file.parent)
    kept = {"identity": identity, "losses": found.losses}
    save_checkpoint(file, found.known.state_dict(), {_FIT: json.dumps(kept)})


def _read_fit(file: Path, identity: str, settings: Settings) -> Fit | None:
    if not file.exists():
        return None
    with open_checkpoint(file) as checkpoint:
        kept = json.loads(checkpoint.metadata.get(_FIT, "{}"))
    if kept.get("identity") != identity:
        return None
    known = Known(settings.checkpoints, settings.preparation, factor=settings.factor)
    known.load_state_dict(read_state(file))
    return Fit(known.eval(), [(one, other) for one, other in kept["losses"]])
