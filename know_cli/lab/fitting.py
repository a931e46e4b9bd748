"""A plain training loop for small classifiers, and their accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from know_cli.errors import UsageError

#: Course of the learning rate: constant, to 0 along half a cosine, or divided by 10 after 60 %
#: and again after 85 % of the training.
SCHEDULES = ("constant", "cosine", "step")
OPTIMISERS = ("adam", "sgd")
#: Maps a batch of inputs and a generator of random numbers to an augmented batch.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]

_DROPS = (0.6, 0.85)
_EVALUATION_ROWS = 500


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: more slow down networks this small, on busy machines a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 32,
    least_batch: int = 1,
    seed: int = 0,
    optimiser: str = "adam",
    weight_decay: float = 0.0,
    schedule: str = "constant",
    augmentation: Augmentation | None = None,
) -> None:
    """Train a classifier in place by cross entropy, and leave it in evaluation mode.

    Args:
        model: maps inputs to logits.
        inputs: ``[n, …]`` as the model takes them.
        labels: ``[n]`` int64.
        epochs: passes over the data.
        learning_rate: the initial one.
        batch_size: samples per step.
        least_batch: a last batch with fewer samples is skipped, unless it is the only one;
            layers that normalise over the batch may need 2.
        seed: of the order of the samples, augmentation and dropout. The global random state is
            not changed.
        optimiser: ``adam`` (AdamW), or ``sgd`` with momentum 0.9.
        weight_decay: decoupled for adam.
        schedule: one of :data:`SCHEDULES`.
        augmentation: applied to each batch of inputs; None for no augmentation.

    Raises:
        UsageError: there is no such optimiser or schedule.
    """
    step = _optimiser(model, optimiser, learning_rate, weight_decay)
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    generator = torch.Generator().manual_seed(seed)
    batches = math.ceil(len(labels) / batch_size)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for number, chosen in enumerate(torch.split(order, batch_size)):
                if len(chosen) < least_batch and batches > 1:
                    continue
                progress = (epoch * batches + number) / (epochs * batches)
                step.param_groups[0]["lr"] = learning_rate * rate_share(schedule, progress)
                batch = inputs[chosen]
                if augmentation is not None:
                    batch = augmentation(batch, generator)
                loss = nn.functional.cross_entropy(model(batch), labels[chosen])
                step.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                step.step()
    model.eval()


def _optimiser(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    settings = {"weight_decay": weight_decay, "fused": True}
    if name == "adam":
        return torch.optim.AdamW(model.parameters(), learning_rate, **settings)  # type: ignore[arg-type]
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, **settings)  # type: ignore[arg-type]
    raise UsageError(f"unknown optimiser {name!r}; choose from {', '.join(OPTIMISERS)}")


def rate_share(schedule: str, progress: float) -> float:
    """The factor of the initial learning rate after a share ``progress`` of the training.

    >>> rate_share("cosine", 0.5)
    0.5
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return float(0.1 ** sum(progress >= drop for drop in _DROPS))
    return 1.0


@one_thread()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of correct answers, 0 to 1, in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        answers = [model(part).argmax(1) for part in torch.split(inputs, _EVALUATION_ROWS)]
    return float((torch.cat(answers) == labels).float().mean())
