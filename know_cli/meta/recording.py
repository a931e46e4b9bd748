"""Records one trajectory of a network from the zoo: trains, measures and keeps a sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from know_cli.forgetting.recorder import Recorder, TrainingSession, derived_seed
from know_cli.forgetting.subsets import nested_subsets
from know_cli.lab.data import AUGMENTATIONS, DataSet, Samples, standardise
from know_cli.lab.data.parts import meta_part
from know_cli.lab.fitting import accuracy, fit
from know_cli.lab.machine import CPU
from know_cli.lab.zoo import build
from know_cli.meta.branch_setup import BranchSetup
from know_cli.meta.run_setup import RunSetup
from know_cli.meta.series import NotUsableError, Series, read_trajectory
from know_cli.meta.setup import Setup

#: The setup of whatever is collected.
AnySetup = Setup | RunSetup | BranchSetup

FUNCTION = "know collect"
#: What facts of a collected trajectory call the most elements that were kept of one tensor.
ROWS = "rows_per_tensor"
#: Accuracies are measured on at most this many samples.
_MEASURED = 1000
#: Session 0 has learned if it is right this many times as often as chance on its own samples.
_LEARNED = 1.5
#: Samples and steps of the training of a pretrained common start.
_START_SAMPLES, _START_STEPS = 500, 150
# Random streams of one trajectory.
_START, _LONGER, _POOL = 10, 11, 12


class Task:
    """A classification task on some classes of a data set, ready for training.

    Args:
        setup: of what is recorded.
        data: the data set that the setup names.
        device: for all samples.

    Attributes:
        inputs: ``[n, …]`` training samples as networks take them, no more than are needed.
        labels: ``[n]`` int64, renumbered from 0.
        test_inputs, test_labels: at most 1,000 samples that no session trains on.
        start_inputs, start_labels: other training samples, for a pretrained common start.
        device: that they are on.
    """

    def __init__(self, setup: AnySetup, data: DataSet, device: torch.device = CPU) -> None:
        generator = np.random.default_rng([setup.seed, _POOL])
        part = meta_part(data)
        inputs, labels = self._of_classes(setup, data, part)
        order = torch.from_numpy(generator.permutation(len(labels)))
        used, others = order[: setup.largest], order[setup.largest :]
        self.inputs, self.labels = inputs[used].to(device), labels[used].to(device)
        others = others[:_START_SAMPLES]
        self.start_inputs, self.start_labels = inputs[others].to(device), labels[others].to(device)
        inputs, labels = self._of_classes(setup, data, data.test)
        chosen = torch.from_numpy(generator.permutation(len(labels))[:_MEASURED])
        self.test_inputs, self.test_labels = inputs[chosen].to(device), labels[chosen].to(device)
        self.device = device

    @staticmethod
    def _of_classes(setup: AnySetup, data: DataSet, samples: Samples) -> tuple[Tensor, Tensor]:
        numbers = torch.full((data.classes,), -1)
        numbers[list(setup.classes)] = torch.arange(len(setup.classes))
        labels = numbers[samples.labels]
        inputs = samples.inputs[labels >= 0]
        if data.kind == "image":
            inputs = standardise(inputs, data.mean, data.deviation)
        return inputs, labels[labels >= 0]


def unseen_samples(setup: AnySetup, data: DataSet, most: int) -> tuple[Tensor, Tensor]:
    """Samples of a :class:`Task` that it was not trained on, nor anything is evaluated on.

    Args:
        setup: of what is recorded.
        data: the data set that the setup names.
        most: how many at most.

    Returns:
        Inputs ``[n, …]`` as networks take them, and labels ``[n]`` int64, renumbered from 0. The
        samples are the part's that :class:`Task` leaves, in its order, but for those that a common
        start was pretrained on.
    """
    generator = np.random.default_rng([setup.seed, _POOL])
    part = meta_part(data)
    numbers = torch.full((data.classes,), -1)
    numbers[list(setup.classes)] = torch.arange(len(setup.classes))
    labels = numbers[part.labels]
    rows = torch.nonzero(labels >= 0)[:, 0]
    order = torch.from_numpy(generator.permutation(len(rows)))
    is_pretrained = isinstance(setup, Setup) and setup.start == "pretrained"
    used = setup.largest + (_START_SAMPLES if is_pretrained else 0)
    chosen = rows[order[used:][:most]]
    inputs = part.inputs[chosen]
    if data.kind == "image":
        inputs = standardise(inputs, data.mean, data.deviation)
    return inputs, labels[chosen]


def record_trajectory(
    setup: Setup,
    data: DataSet,
    folder: Path,
    *,
    rows_per_tensor: int,
    device: torch.device = CPU,
) -> Series:
    """Train all sessions and continuations of a trajectory.

    Args:
        setup: of the trajectory.
        data: the data set that the setup names.
        folder: for the checkpoints; sessions that are already in it are not trained again.
        rows_per_tensor: the most elements kept of one tensor.
        device: where the networks are trained.

    Returns:
        A sample of the parameters in every checkpoint. Its facts have the setup, the most elements
        that were kept of one tensor, and for each session its accuracies: ``train_accuracy`` and
        ``test_accuracy``, for session 0, where it is continued on more data, also
        ``longer_test_accuracy``, that of Θ0 trained further on D0 for as many steps as the first
        continuation.

    Raises:
        NotUsableError: session 0 learned nothing, or the training diverged.
    """
    task = Task(setup, data, device)
    subsets = nested_subsets(
        setup.largest,
        setup.rate,
        setup.continuations + setup.sessions,
        setup.seed,
        task.labels.cpu().numpy(),
    )
    recorder = Recorder(
        folder,
        subsets,
        rate=setup.rate,
        seed=setup.seed,
        before=setup.continuations,
        function=FUNCTION,
        start=None if setup.start is None else _common_start(setup, task),
    )
    for session in recorder:
        model, measurements = _train(setup, task, session)
        if session.index == 0:
            _check_learned(measurements["train_accuracy"], len(setup.classes))
        recorder.save(session, model, measurements)
    series = read_trajectory(folder, rows_per_tensor=rows_per_tensor, seed=setup.seed)
    series.facts["setup"] = setup.to_json()
    series.facts[ROWS] = rows_per_tensor
    return series


def _check_learned(share: float, classes: int) -> None:
    if not share > min(_LEARNED / classes, 1.0):
        raise NotUsableError(f"session 0 learned nothing (train accuracy {share:.3f})")


def first_network(setup: Setup) -> nn.Module:
    """The network of a trajectory as its first session finds it, but for a pretrained start."""
    if setup.start is None:
        return build(setup.design, derived_seed(setup.seed, 0, 0))
    return build(setup.design, derived_seed(setup.seed, _START))


def _common_start(setup: Setup, task: Task) -> Mapping[str, Tensor]:
    seed = derived_seed(setup.seed, _START)
    model = build(setup.design, seed).to(task.device)
    if setup.start == "pretrained" and len(task.start_labels):
        batches = math.ceil(len(task.start_labels) / setup.batch_size)
        epochs = max(round(_START_STEPS / batches), 1)
        _fit(setup, model, task.start_inputs, task.start_labels, epochs, 1.0, seed)
    return {name: tensor.clone().cpu() for name, tensor in model.state_dict().items()}


def _train(
    setup: Setup, task: Task, session: TrainingSession
) -> tuple[nn.Module, dict[str, float]]:
    model = build(setup.design, session.seed).to(task.device)
    if session.start is not None:
        model.load_state_dict(session.start)
    samples = torch.from_numpy(session.indices)
    inputs, labels = task.inputs[samples], task.labels[samples]
    epochs, rate = setup.epochs, 1.0
    if session.is_continuation:
        epochs, rate = setup.continued(-session.index), setup.later_rate
    elif session.index > 0 and setup.start is None:
        epochs, rate = max(round(setup.epochs * setup.later_epochs), 1), setup.later_rate
    _fit(setup, model, inputs, labels, epochs, rate, session.seed)
    measurements = _accuracies(model, task, inputs, labels)
    if session.index == 0 and setup.continuations:
        longer = copy.deepcopy(model)
        seed = derived_seed(setup.seed, _LONGER)
        _fit(setup, longer, inputs, labels, setup.longer_epochs, setup.later_rate, seed)
        found = _accuracies(longer, task, inputs, labels)
        measurements |= {f"longer_{name}": value for name, value in found.items()}
    return model, measurements


def _fit(
    setup: Setup,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    epochs: int,
    share_of_rate: float,
    seed: int,
) -> None:
    fit(
        model,
        inputs,
        labels,
        epochs=epochs,
        learning_rate=setup.learning_rate * share_of_rate,
        batch_size=setup.batch_size,
        least_batch=2,
        seed=seed,
        optimiser=setup.optimiser,
        weight_decay=setup.weight_decay,
        schedule=setup.schedule,
        augmentation=AUGMENTATIONS[setup.design.inputs.kind][setup.augmentation],
    )


def _accuracies(model: nn.Module, task: Task, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "train_accuracy": round(accuracy(model, inputs[:_MEASURED], labels[:_MEASURED]), 4),
        "test_accuracy": round(accuracy(model, task.test_inputs, task.test_labels), 4),
    }
