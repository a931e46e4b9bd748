"""The demonstration on real data: record forgetting, predict, fine-tune, compare.

A small network is pre-trained on digits (from the half of scikit-learn's digits that the bundled
KNOWN has never seen) and forgets over four more sessions. It is then fine-tuned on a few other,
noisy digits: from Θ0, from each prediction, from fresh weights, and from Θ0 actually trained
further on twice the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints.state import read_state
from know_cli.evaluation.statistics import interval_half_width
from know_cli.forgetting.recorder import Recorder, checkpoint_name, derived_seed
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.digits import build_model, load_digits
from know_cli.lab.fitting import accuracy, fit

SESSIONS = 5
RATE = 0.5
STEPS = 3
FINE_TUNING_IMAGES = 50
# Standard deviation of the noise on the downstream images, relative to that of the pixels.
NOISE = 0.7
_SESSION_EPOCHS = 40
_SESSION_LEARNING_RATE = 5e-3
_SESSION_WEIGHT_DECAY = 1e-2
_SESSION_BATCH_SIZE = 16
_FINE_TUNING_EPOCHS = 20
_FINE_TUNING_LEARNING_RATE = 1e-3
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Row:
    """What fine-tuning from one start came to.

    Attributes:
        start: name of the start.
        accuracy: mean over the seeds, 0 to 1.
        difference: mean paired difference from Θ0; None for Θ0 itself.
        interval: half-width of that mean's 95 % interval; None for Θ0 itself.
    """

    start: str
    accuracy: float
    difference: float | None
    interval: float | None


@dataclass(frozen=True)
class SessionRow:
    """One session of the forgetting.

    Attributes:
        index: 0 for the full data.
        images: how many it trained on.
        train_accuracy: on these images, 0 to 1.
        test_accuracy: on the images of the downstream task, none of which it trained on.
    """

    index: int
    images: int
    train_accuracy: float
    test_accuracy: float


def _images(*, downstream: bool) -> tuple[Tensor, Tensor]:
    """Images and labels for pre-training, or the noisy others for the downstream task."""
    images, labels = load_digits("demo")
    everything, first = nested_subsets(len(labels), 0.5, 2, _SPLIT_SEED, labels.numpy())
    if not downstream:
        return images[first], labels[first]
    others = np.setdiff1d(everything, first)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    noise = torch.randn(images[others].shape, generator=generator)
    return images[others] + NOISE * noise, labels[others]


def record(folder: Path, seed: int, report: Callable[[str], None]) -> list[SessionRow]:
    """Pre-train and forget, continuing where an earlier call was interrupted.

    Args:
        folder: for the checkpoints of five sessions and ``continued1.safetensors``.
        seed: of all random numbers.
        report: called with a line of text before each session.

    Returns:
        One row per session.

    Raises:
        UsageError: the folder holds another trajectory.
    """
    images, labels = _images(downstream=False)
    test_images, test_labels = _images(downstream=True)
    recorder = Recorder(
        folder,
        nested_subsets(len(labels), RATE, SESSIONS + 1, seed, labels.numpy()),
        rate=RATE,
        seed=seed,
        before=1,
        function="know demo",
    )
    for session in recorder:
        report(f"training {session.name} on {len(session.indices)} images")
        model = build_model(session.seed)
        if session.start is not None:
            model.load_state_dict(session.start)
        chosen = torch.from_numpy(session.indices)
        fit(
            model,
            images[chosen],
            labels[chosen],
            epochs=_SESSION_EPOCHS,
            learning_rate=_SESSION_LEARNING_RATE,
            weight_decay=_SESSION_WEIGHT_DECAY,
            batch_size=_SESSION_BATCH_SIZE,
            seed=session.seed,
        )
        measured = {
            "images": float(len(chosen)),
            "train_accuracy": accuracy(model, images[chosen], labels[chosen]),
            "test_accuracy": accuracy(model, test_images, test_labels),
        }
        recorder.save(session, model, measured)
    rows = []
    for index in range(SESSIONS):
        found = recorder.measurements(index)
        rows.append(
            SessionRow(index, int(found["images"]), found["train_accuracy"], found["test_accuracy"])
        )
    return rows


def fine_tune(
    starts: dict[str, Path | None], seed: int, repetitions: int, report: Callable[[str], None]
) -> list[Row]:
    """Fine-tune every start on the downstream task, all with the same images in the same order.

    Args:
        starts: name → checkpoint, None for fresh weights; the others are compared with the
            first.
        seed: of all random numbers.
        repetitions: fine-tunings per start, each with its own images, order and head; at least 2.
        report: called with a line of text before each start.

    Returns:
        One row per start, in the given order.
    """
    images, labels = _images(downstream=True)
    results: dict[str, list[float]] = {}
    for name, path in starts.items():
        report(f"fine-tuning from {name}, {repetitions} times")
        state = None if path is None else read_state(path)
        results[name] = [
            _fine_tune_once(state, images, labels, derived_seed(seed, repetition))
            for repetition in range(repetitions)
        ]
    base = next(iter(results.values()))
    rows = []
    for position, (name, values) in enumerate(results.items()):
        if position == 0:
            rows.append(Row(name, _mean(values), None, None))
            continue
        differences = [value - other for value, other in zip(values, base, strict=True)]
        rows.append(Row(name, _mean(values), _mean(differences), interval_half_width(differences)))
    return rows


def _fine_tune_once(
    state: dict[str, Tensor] | None, images: Tensor, labels: Tensor, seed: int
) -> float:
    rate = FINE_TUNING_IMAGES / len(labels)
    everything, train = nested_subsets(len(labels), rate, 2, seed, labels.numpy())
    test = torch.ones(len(everything), dtype=torch.bool)
    test[torch.from_numpy(train)] = False
    model = build_model(seed)
    if state is not None:
        model.load_state_dict(state)
    fit(
        model,
        images[train],
        labels[train],
        epochs=_FINE_TUNING_EPOCHS,
        learning_rate=_FINE_TUNING_LEARNING_RATE,
        seed=seed,
    )
    return accuracy(model, images[test], labels[test])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def starts(folder: Path, predictions: dict[str, Path]) -> dict[str, Path | None]:
    """The starts that the demonstration compares, Θ0 first."""
    return {
        "first checkpoint": folder / checkpoint_name(0),
        **{f"predicted {name}": path for name, path in predictions.items()},
        "really continued on x2": folder / checkpoint_name(-1),
        "fresh weights": None,
    }
