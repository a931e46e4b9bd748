"""A training that can be stopped, kept and continued in several ways, each step the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.fitting import OPTIMISERS, Augmentation

#: The learning rate as a share of the given one, by the step's number from 0.
Schedule = Callable[[int], float]

_ORDER, _NOISE, _AUGMENTATION = range(60, 63)


class Training:
    """A classifier's training by cross entropy, step by step.

    What a step sees depends on the seed and its number only, so that continuations are paired:
    the same batch, the same augmentation and the same dropout at the same step.

    Args:
        model: trained in place; parameters without a gradient stay as they are.
        inputs: ``[n, …]`` as the model takes them.
        targets: int64 ``[n]`` or ``[n, …]``, as for cross entropy.
        batch_size: samples per step; a last batch of a pass that is not full is left out.
        learning_rate: that schedules give shares of.
        seed: of the order of the samples, augmentation and dropout.
        optimiser: ``adam`` (AdamW), or ``sgd`` with momentum 0.9.
        weight_decay: decoupled for adam.
        augmentation: applied to each batch of inputs; None for no augmentation.

    Attributes:
        model: the network.
        done: number of steps so far.

    Raises:
        UsageError: there is no such optimiser.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        learning_rate: float,
        seed: int,
        optimiser: str = "adam",
        weight_decay: float = 0.0,
        augmentation: Augmentation | None = None,
    ) -> None:
        if optimiser not in OPTIMISERS:
            raise UsageError(
                f"unknown optimiser {optimiser!r}; choose from {', '.join(OPTIMISERS)}"
            )
        self.model = model
        self.done = 0
        self._data = (inputs, targets)
        self._batch_size, self._learning_rate, self._seed = batch_size, learning_rate, seed
        self._augmentation = augmentation
        self._momentum = None if optimiser == "adam" else 0.9
        self._weight_decay = weight_decay
        self._optimiser = self._new_optimiser(model)
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the samples."""
        return max(len(self._data[1]) // self._batch_size, 1)

    def advance(self, steps: int, schedule: Schedule) -> None:
        """Train for some steps; the network is left in evaluation mode."""
        inputs, targets = self._data
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            for _ in range(steps):
                for group in self._optimiser.param_groups:
                    group["lr"] = self._learning_rate * schedule(self.done)
                chosen = self._batch()
                batch = inputs[chosen]
                if self._augmentation is not None:
                    if batch.dtype == torch.uint8:
                        batch = batch.float() / 255
                    seed = derived_seed(self._seed, _AUGMENTATION, self.done)
                    batch = self._augmentation(batch, torch.Generator().manual_seed(seed))
                torch.manual_seed(derived_seed(self._seed, _NOISE, self.done))
                loss = nn.functional.cross_entropy(self.model(batch), targets[chosen])
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self.done += 1
        self.model.eval()

    def branch(self, seed: int | None = None, chosen: Tensor | None = None) -> Training:
        """A copy with all the optimiser's state, to be continued in another way.

        Args:
            seed: of the order of the samples from here on; None for the same.
            chosen: int64 indices of the samples that the copy goes on with; None for all.
        """
        other = copy.copy(self)
        if seed is not None:
            other._seed, other._epoch = seed, -1
        if chosen is not None:
            other._data = (self._data[0][chosen], self._data[1][chosen])
            other._epoch = -1
        other.model = copy.deepcopy(self.model)
        other._optimiser = self._new_optimiser(other.model)
        other._optimiser.load_state_dict(copy.deepcopy(self._optimiser.state_dict()))
        return other

    def _batch(self) -> Tensor:
        epoch, number = divmod(self.done, self.epoch_steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, _ORDER, epoch))
            self._order = torch.randperm(len(self._data[1]), generator=generator)
            self._epoch = epoch
        size = self._batch_size
        return self._order[number * size : (number + 1) * size]

    def _new_optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        rate, decay = self._learning_rate, self._weight_decay
        if self._momentum is None:
            return torch.optim.AdamW(trained, rate, weight_decay=decay, fused=True)
        return torch.optim.SGD(
            trained, rate, momentum=self._momentum, weight_decay=decay, fused=True
        )
