"""What predicted weights are worth to another task: a few steps of fine-tuning with a fresh head.

The gradient is of first order: what the steps add to the weights is taken to be the same for all
weights near by, so that the loss after them is one of the predicted weights, and no step has to be
kept (first-order MAML, Finn et al. 2017, section 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.lab.data import DataSet, load
from know_cli.lab.data.parts import meta_part
from know_cli.lab.data.samples import reduced, standardise
from know_cli.lab.zoo import Inputs
from know_cli.meta.network_data import MOST_UNSEEN, NetworkRun, OtherTask, State, outputs
from know_cli.meta.network_settings import DOWNSTREAM_BATCH, NetworkSettings

#: What the zoo's networks call their last layer, which another task has afresh.
HEAD = "head."
#: Adam's rate is drawn between these, so that no start is learned for a single one.
_RATES = (1e-3, 1e-2)


def with_other_tasks(runs: Sequence[NetworkRun], data_folder: Path | None) -> list[NetworkRun]:
    """Give each network the tasks of the data sets that only others were trained on.

    Those that cannot take any other, such as networks of texts, get none. Of a data set the part
    is taken that trajectories may be recorded on, in the form that the network takes: of its size,
    and grey where it has not as many channels.

    Args:
        runs: to be taught on.
        data_folder: where the data sets' files are.

    Raises:
        UsageError: no network has another task.
    """
    names = sorted({run.setup.data_set for run in runs})
    data: dict[str, DataSet] = {}
    tasks: dict[tuple[str, Inputs], OtherTask | None] = {}
    found = []
    for run in runs:
        inputs = run.setup.design.inputs
        others = []
        for name in names:
            if name == run.setup.data_set:
                continue
            if (name, inputs) not in tasks:
                if name not in data:
                    data[name] = load(name, data_folder)
                tasks[name, inputs] = _task(data[name], inputs)
            task = tasks[name, inputs]
            others += [] if task is None else [task]
        found.append(replace(run, others=tuple(others)))
    if not any(run.others for run in found):
        sides = sorted({"×".join(map(str, run.setup.design.inputs.shape)) for run in runs})
        raise UsageError(
            f"--downstream: of the data sets {', '.join(names)} none is another task for a network "
            f"of inputs {', '.join(sides)}; collect from two data sets of images, of one --side"
        )
    return found


def check_examples(runs: Sequence[NetworkRun], settings: NetworkSettings) -> None:
    """Refuse numbers of examples that leave none of another task to take the loss of.

    Args:
        runs: with their other tasks, of which at least one has any.
        settings: with the numbers.

    Raises:
        UsageError: fewer than a batch would be left of one of the tasks.
    """
    there = min(len(task.labels) for run in runs for task in run.others)
    most = max(settings.downstream_examples)
    if most > there - settings.batch:
        raise UsageError(
            f"--downstream-examples {most}: another task has {there:,}, and the loss after "
            f"fine-tuning is of {settings.batch} more; give at most {there - settings.batch:,}"
        )


def _task(data: DataSet, wanted: Inputs) -> OtherTask | None:
    if data.kind != "image" or wanted.kind != "image":
        return None
    data = reduced(data, wanted.side)
    channels, *size = wanted.shape
    if list(data.shape[1:]) != size:
        return None
    part = meta_part(data)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(part.labels)))[:MOST_UNSEEN]
    inputs = standardise(part.inputs[order], data.mean, data.deviation)
    if inputs.shape[1] != channels:
        inputs = inputs.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
    return OtherTask(inputs, part.labels[order], data.classes)


def loss_downstream(
    run: NetworkRun,
    state: Mapping[str, Tensor],
    settings: NetworkSettings,
    generator: np.random.Generator,
) -> Tensor:
    """Cross entropy on another task after some steps of Adam, whose gradient is of first order.

    Args:
        run: with at least one other task.
        state: its weights, with the gradient of those that are predicted.
        settings: with the number of steps, and the numbers of examples that these may use.
        generator: of the task, the number of its examples, these, the head and the rate.

    Returns:
        A scalar, of examples that the steps did not see.
    """
    task = run.others[generator.integers(len(run.others))]
    numbers = settings.downstream_examples
    # A single number takes no draw, so that all others are as they were when there was but one.
    examples = numbers[generator.integers(len(numbers))] if len(numbers) > 1 else numbers[0]
    order = torch.from_numpy(generator.permutation(len(task.labels)))
    seen, unseen = order[:examples], order[examples : examples + settings.batch]
    lowest, highest = _RATES
    rate = lowest * (highest / lowest) ** generator.random()
    first = {name: tensor.detach().clone() for name, tensor in state.items()}
    first |= _fresh_head(first, task.classes, generator)
    body = [name for name in run.kinds if not name.startswith(HEAD)]
    head = [name for name in first if name.startswith(HEAD)]
    trained = {name: first[name].clone().requires_grad_() for name in (*body, *head)}
    adam = torch.optim.Adam(trained.values(), rate)
    run.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator.integers(2**31)))
        for _ in range(settings.downstream_steps):
            rows = seen[torch.from_numpy(generator.integers(len(seen), size=DOWNSTREAM_BATCH))]
            found = outputs(run, {**first, **trained}, task.inputs[rows])
            adam.zero_grad()
            nn.functional.cross_entropy(found, task.labels[rows]).backward()  # type: ignore[no-untyped-call]
            adam.step()
        moved: State = {name: state[name] + (trained[name].detach() - first[name]) for name in body}
        tuned = {**first, **{name: trained[name].detach() for name in head}, **moved}
        found = outputs(run, tuned, task.inputs[unseen])
    run.model.eval()
    return nn.functional.cross_entropy(found, task.labels[unseen])


def _fresh_head(state: Mapping[str, Tensor], classes: int, generator: np.random.Generator) -> State:
    """The last layer with other weights, as torch draws them."""
    width = state[f"{HEAD}weight"].shape[1]
    bound = 1 / math.sqrt(width)
    return {
        f"{HEAD}{name}": torch.from_numpy(generator.uniform(-bound, bound, shape)).float()
        for name, shape in (("weight", (classes, width)), ("bias", (classes,)))
        if f"{HEAD}{name}" in state
    }
