"""The demonstration on real data: record a run and a forgetting, and choose a start from each.

A small network is trained on digits (from the half of scikit-learn's digits that the bundled KNOWN
has never seen): once in an ordinary run that keeps its last checkpoints, and once with the four
sessions of a forgetting after it. The task that a start is chosen for is another one: a few other,
noisy digits to fine-tune on, and the rest of these to be measured on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints.state import read_state
from know_cli.errors import UsageError
from know_cli.files import json_text, make_folder, read_text, write_text
from know_cli.forgetting.recorder import Recorder, derived_seed
from know_cli.forgetting.runs import RunRecorder
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.digits import build_model, load_digits
from know_cli.lab.fitting import accuracy, fit, one_thread
from know_cli.lab.stepping import Training

SESSIONS = 5
RATE = 0.5
FINE_TUNING_IMAGES = 50
#: What ``know choose`` is told to measure with, and what it is to tune for every start.
MEASURE = f"{__name__}:fine_tuned_accuracy"
TUNED = "lr=3e-4,1e-3,3e-3"
#: Candidates of a run and of a forgetting: few, since each is measured at three rates.
OF_RUN = ("average", "average,last=3", "shrink,lambda=0.8", "task-vector,alpha=0.5")
OF_FORGETTING = ("known", "known,steps=2", "average", "shrink,lambda=0.8")
# Standard deviation of the noise on the downstream images, relative to that of the pixels.
NOISE = 0.7
_EPOCHS = 40
_LEARNING_RATE = 5e-3
_WEIGHT_DECAY = 1e-2
_BATCH_SIZE = 16
# The run is short, at a constant rate that is rather high, as runs are before their decay.
_RUN_EPOCHS = 12
_RUN_LEARNING_RATE = 1e-2
_RUN_BATCH_SIZE = 8
_FINE_TUNING_EPOCHS = 20
_SPLIT_SEED = 0
# With the run, whose checkpoints do not tell their seed.
_RECORD = "know-demo.json"
# The random stream of a fine-tuning, so that it is none of the pre-training's.
_DOWNSTREAM = 70


@dataclass(frozen=True)
class RunRow:
    """One checkpoint of the run.

    Attributes:
        path: its file.
        test_accuracy: on the images of the downstream task, none of which it trained on.
    """

    path: Path
    test_accuracy: float


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


@cache
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


def _forgetting(folder: Path, seed: int) -> Recorder:
    labels = _images(downstream=False)[1]
    return Recorder(
        folder,
        nested_subsets(len(labels), RATE, SESSIONS, seed, labels.numpy()),
        rate=RATE,
        seed=seed,
        function="know demo",
    )


def record_run(
    folder: Path, forgetting: Path, seed: int, report: Callable[[str], None]
) -> list[RunRow]:
    """Train at a constant rate, and keep the last checkpoints.

    Args:
        folder: for the checkpoints; those of an earlier call are taken.
        forgetting: of the same demonstration, which has to have the same seed.
        seed: of all random numbers.
        report: called with a line of text before the training.

    Returns:
        A row per checkpoint, the first one first.

    Raises:
        UsageError: the folder has another seed's, or a run that was not finished.
        OutputError: it cannot be written.
    """
    if forgetting.exists():
        _forgetting(forgetting, seed)  # refuses another seed
    images, labels = _images(downstream=False)
    start = derived_seed(seed, 0, 0)
    training = Training(
        build_model(start),
        images,
        labels,
        batch_size=_RUN_BATCH_SIZE,
        learning_rate=_RUN_LEARNING_RATE,
        seed=start,
        weight_decay=_WEIGHT_DECAY,
    )
    run = RunRecorder(folder, every=training.epoch_steps, last=SESSIONS)
    recorded = _recorded_seed(folder)
    last = run.folder / f"checkpoint-{_RUN_EPOCHS * training.epoch_steps}.safetensors"
    if run.kept[-1:] == [last]:
        if recorded not in (None, seed):
            raise UsageError(
                f"{folder}: has the run of seed {recorded}, not {seed}; give --seed {recorded}, or "
                "name another folder"
            )
    else:
        run.begin(0)
        make_folder(folder)
        # Before the first checkpoint, so that there is none of an unknown seed.
        text = json_text({"seed": seed})
        write_text(folder / _RECORD, text, replace=recorded is not None)
        report(f"training on {len(labels)} images, {_RUN_EPOCHS} epochs at a constant rate")
        with one_thread():
            for _ in range(_RUN_EPOCHS):
                training.advance(training.epoch_steps, lambda step: 1.0)
                run.save(training.done, training.model)
    model, test = build_model(0), _images(downstream=True)
    rows = []
    for path in run.kept:
        model.load_state_dict(read_state(path))
        rows.append(RunRow(path, accuracy(model, *test)))
    return rows


def _recorded_seed(folder: Path) -> int | None:
    """The seed of the run in a folder; None where none is recorded.

    Raises:
        UsageError: what is in the place of the record is something else.
    """
    record = folder / _RECORD
    if not record.exists():
        return None
    try:
        seed = json.loads(read_text(record))["seed"]
        if type(seed) is not int:
            raise ValueError("no whole number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{record}: is not what 'know demo' writes ({error!r}); name another folder"
        ) from error
    return seed


def record_forgetting(folder: Path, seed: int, report: Callable[[str], None]) -> list[SessionRow]:
    """Pre-train and forget, continuing where an earlier call was interrupted.

    Args:
        folder: for the checkpoints of five sessions.
        seed: of all random numbers.
        report: called with a line of text before each session.

    Returns:
        One row per session.

    Raises:
        UsageError: the folder holds another trajectory.
    """
    images, labels = _images(downstream=False)
    test_images, test_labels = _images(downstream=True)
    recorder = _forgetting(folder, seed)
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
            epochs=_EPOCHS,
            learning_rate=_LEARNING_RATE,
            weight_decay=_WEIGHT_DECAY,
            batch_size=_BATCH_SIZE,
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


def fine_tuned_accuracy(state: Mapping[str, Tensor], seed: int, lr: str = "1e-3") -> float:
    """Fine-tune a start on a few noisy digits, and measure it on the others.

    This is what a user writes for ``know choose --evaluate``.

    Args:
        state: of the start.
        seed: of which images are fine-tuned on, and of their order.
        lr: the learning rate; tuned values come as text.

    Returns:
        The accuracy, 0 to 1.
    """
    images, labels = _images(downstream=True)
    seed = derived_seed(seed, _DOWNSTREAM)
    share = FINE_TUNING_IMAGES / len(labels)
    everything, train = nested_subsets(len(labels), share, 2, seed, labels.numpy())
    test = torch.ones(len(everything), dtype=torch.bool)
    test[torch.from_numpy(train)] = False
    model = build_model(seed)
    model.load_state_dict(dict(state))
    fit(
        model,
        images[train],
        labels[train],
        epochs=_FINE_TUNING_EPOCHS,
        learning_rate=float(lr),
        seed=seed,
    )
    return accuracy(model, images[test], labels[test])
