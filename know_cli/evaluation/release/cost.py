"""How much training a trial of the release regime takes, and how long that takes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from know_cli.evaluation.costs import Costs
from know_cli.evaluation.release.fine_tuning import GRID, MARGIN
from know_cli.evaluation.release.plan import chosen
from know_cli.evaluation.release.suite import ReleaseRequest
from know_cli.evaluation.release.task import FRESH, OF_MORE_DATA, SESSIONS, ReleaseTask
from know_cli.evaluation.tasks.classification import Classification
from know_cli.files import read_text

_MEASURED = Path(__file__).with_name("seconds.json")

#: How many rates a start is fine-tuned at, where the best is among the first ones.
USUAL_RATES = len(GRID) + MARGIN


@dataclass(frozen=True)
class Measured:
    """What training takes.

    Attributes:
        processor: on which it was measured.
        seconds: of its time for one example that a network is trained on once, by task.
        batch_norm: the tasks whose networks have BatchNorm, which can be treated in several ways.
    """

    processor: str
    seconds: Mapping[str, float]
    batch_norm: frozenset[str]


def measured() -> Measured:
    """What the training of every task takes, from the time of a few steps."""
    found = json.loads(read_text(_MEASURED))
    return Measured(found["processor"], found["seconds"], frozenset(found["batch_norm"]))


def pretrained_examples(task: ReleaseTask) -> float:
    """Examples that Θ0, its sessions and what trains longer see, each time that they do."""
    samples, epochs = pretrained_samples(task), task.base.recipe.epochs
    sessions = samples * sum(task.rate**index for index in range(1, SESSIONS))
    more = 0 if task.uses_all else task.base.largest
    return epochs * (samples + more + 3 * sessions)  # two more trainings as long


def pretrained_samples(task: ReleaseTask) -> int:
    """|D0|."""
    base = task.base
    return base.largest if task.uses_all and isinstance(base, Classification) else base.samples


def fine_tuned_examples(task: ReleaseTask, size: int, rates: int = USUAL_RATES) -> int:
    """Examples that one start is fine-tuned on, each time that it is.

    Args:
        task: with the epochs of both phases.
        size: examples of the condition.
        rates: at how many rates.
    """
    return size * (task.fine_tuning.head_epochs + task.fine_tuning.epochs * rates)


def request_costs(request: ReleaseRequest) -> Costs:
    """What one trial of each task costs with all that a request asks for, where it is known."""
    found = measured()
    seconds = {
        task.name: found.seconds[task.name] * _examples(task, request, found.batch_norm)
        for task in request.tasks
        if task.name in found.seconds
    }
    return Costs(found.processor, seconds)


def _examples(task: ReleaseTask, request: ReleaseRequest, batch_norm: Collection[str]) -> float:
    arms = [
        arm
        for arm in chosen(task.arms(request.bundles), request.methods)
        if (arm.norm == FRESH or task.name in batch_norm)
        and not (request.first is not None and arm.name in OF_MORE_DATA)
    ]
    sizes = [one.size for one in task.base.downstream]
    wanted = [max(sizes) * share // 100 for share in request.shares]
    tuned = sum(fine_tuned_examples(task, size) for size in sizes if size in wanted)
    return pretrained_examples(task) + len(arms) * tuned
