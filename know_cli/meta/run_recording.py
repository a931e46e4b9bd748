"""Records one run of a network from the zoo: a window of checkpoints, and what came after it.

A run is a folder of safetensors files: the window as ``checkpoint-NNNNNN``, which
``know-predict`` reads as it is; ``annealed-5`` … ``annealed-40``, the newest checkpoint trained on
by as many per cent of its steps while the rate falls to 0; ``future-mean``, the mean of as many
checkpoints after the window, as far apart; ``longer``, the last of these. A brief record has
``annealed-20`` only. ``run.json`` has the setup, from which :func:`rebuild` makes the network and
its data again, and the losses and accuracies of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import TRAINING_STEP, TRAJECTORY_KIND, TrajectoryKind
from know_cli.files import json_text, make_folder, write_text
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.averaging import combine, shape_of
from know_cli.lab.data import AUGMENTATIONS, DataSet
from know_cli.lab.fitting import one_thread
from know_cli.lab.machine import CPU
from know_cli.lab.stepping import Schedule, Training
from know_cli.lab.zoo import build
from know_cli.meta.branch_setup import BranchSetup
from know_cli.meta.recording import Task
from know_cli.meta.run_setup import RunSetup
from know_cli.meta.series import NotUsableError

RUN_RECORD = "run.json"
FORMAT = 1
_ROWS = 500
# Random streams of one run.
_INITIAL, _ORDER = range(80, 82)

State = dict[str, Tensor]


def checkpoint_file(step: int) -> str:
    """File name of a checkpoint of the window."""
    return f"checkpoint-{step:06d}.safetensors"


def annealed_file(share: float) -> str:
    """File name of an annealed continuation."""
    return f"annealed-{round(100 * share)}.safetensors"


FUTURE_MEAN = "future-mean.safetensors"
LONGER = "longer.safetensors"


def rebuild(facts: Mapping[str, Any], data: DataSet) -> tuple[nn.Module, Task]:
    """The network of a collected run, with its initial weights, and the data it was trained on.

    Args:
        facts: the contents of its ``run.json``.
        data: the data set that the setup names.
    """
    setup = RunSetup.from_json(facts["setup"])
    return build(setup.design, derived_seed(setup.seed, _INITIAL)), Task(setup, data)


@one_thread()
def record_run(
    setup: RunSetup, data: DataSet, folder: Path, device: torch.device = CPU
) -> dict[str, Any]:
    """Train a run and its continuations, and write them.

    Args:
        setup: of the run.
        data: the data set that the setup names.
        folder: for the files; created if missing.
        device: where the network is trained.

    Returns:
        The contents of ``run.json``: the ``setup``; ``measured``, by name the ``loss`` and
        ``accuracy`` on ``train`` and ``test`` samples, also of the window's mean, ``average``;
        the ``shape`` of the window of three or more checkpoints, see
        :func:`~know_cli.lab.averaging.shape_of`.

    Raises:
        NotUsableError: the training diverged.
        OutputError: the folder cannot be written.
    """
    make_folder(folder)
    task = Task(setup, data, device)
    run = new_training(setup, task)
    model = run.model
    window = [_at(run, step, setup) for step in setup.window]
    ends = {}
    for share in setup.shares:
        branch, steps = run.branch(), setup.annealed(share)
        first = setup.rate(setup.end)
        branch.advance(steps, falling(first, setup.end, steps))
        ends[annealed_file(share)] = copied(branch.model)
    future = [_at(run, step, setup) for step in setup.future]
    if future:
        ends[FUTURE_MEAN] = _mean(future)
        ends[LONGER] = future[-1]
    measured = {
        "last": measured_state(model, window[-1], task),
        "average": measured_state(model, _mean(window), task),
    }
    for name, state in ends.items():
        measured[name.removesuffix(".safetensors")] = measured_state(model, state, task)
    if not all(math.isfinite(found["train_loss"]) for found in measured.values()):
        raise NotUsableError("the training diverged")
    for step, state in zip(setup.window, window, strict=True):
        metadata = {TRAJECTORY_KIND: TrajectoryKind.RUN.value, TRAINING_STEP: str(step)}
        save_checkpoint(folder / checkpoint_file(step), state, {"format": "pt", **metadata})
    for name, state in ends.items():
        save_checkpoint(folder / name, state, {"format": "pt"})
    facts = {
        "format": FORMAT,
        "setup": setup.to_json(),
        "parameters": sum(t.numel() for t in window[-1].values() if t.is_floating_point()),
        "measured": measured,
        "shape": shape_of(window) if len(window) > 2 else {},
    }
    write_text(folder / RUN_RECORD, json_text(facts, indent=1), replace=True)
    return facts


def new_training(setup: RunSetup | BranchSetup, task: Task) -> Training:
    """The training of a network from its initial weights on a task's samples, not begun."""
    return Training(
        build(setup.design, derived_seed(setup.seed, _INITIAL)).to(task.device),
        task.inputs,
        task.labels,
        batch_size=setup.batch_size,
        learning_rate=setup.learning_rate,
        seed=derived_seed(setup.seed, _ORDER),
        optimiser=setup.optimiser,
        weight_decay=setup.weight_decay,
        augmentation=AUGMENTATIONS[setup.design.inputs.kind][setup.augmentation],
    )


def _at(run: Training, step: int, setup: RunSetup) -> State:
    run.advance(step - run.done, setup.rate)
    return copied(run.model)


def falling(first: float, begin: int, steps: int) -> Schedule:
    """A rate that falls in a line from a share of the learning rate to 0, by some steps."""
    return lambda step: first * (1 - (step - begin + 0.5) / steps)


def copied(model: nn.Module) -> State:
    """A copy of a network's state, in main memory."""
    return {name: tensor.clone().cpu() for name, tensor in model.state_dict().items()}


def _mean(states: list[State]) -> State:
    return combine(states, [1 / len(states)] * len(states))


def measured_state(model: nn.Module, state: State, task: Task) -> dict[str, float]:
    """Loss and accuracy of a state, on at most 1,000 samples each.

    Args:
        model: the network, which has the state afterwards.
        state: its weights.
        task: that it was trained on.

    Returns:
        ``train_loss``, ``train_accuracy``, ``test_loss`` and ``test_accuracy``.
    """
    model.load_state_dict(state)
    model.eval()
    found = {}
    for name, inputs, labels in (
        ("train", task.inputs[: len(task.test_labels)], task.labels[: len(task.test_labels)]),
        ("test", task.test_inputs, task.test_labels),
    ):
        with torch.inference_mode():
            outputs = torch.cat([model(part) for part in torch.split(inputs, _ROWS)])
        found[f"{name}_loss"] = round(float(nn.functional.cross_entropy(outputs, labels)), 5)
        found[f"{name}_accuracy"] = round(float((outputs.argmax(1) == labels).float().mean()), 4)
    return found
