"""A training that can be stopped, kept and continued in several ways, each step the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from know_cli.evaluation.tasks import Examples, Recipe
from know_cli.forgetting.recorder import derived_seed

#: The learning rate as a share of the recipe's, by the step's number from 0.
Schedule = Callable[[int], float]

_ORDER, _NOISE = range(60, 62)


class Training:
    """AdamW on a network, step by step.

    What a step sees depends on the seed and its number only, so that continuations are paired:
    the same batch, and the same dropout, at the same step.

    Args:
        model: trained in place.
        examples: to train on.
        recipe: batch size, rate and weight decay.
        seed: of the order of the examples and of dropout.
    """

    def __init__(self, model: nn.Module, examples: Examples, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.done = 0
        self._examples, self._recipe, self._seed = examples, recipe, seed
        self._optimiser = torch.optim.AdamW(
            [tensor for tensor in model.parameters() if tensor.requires_grad],
            recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.int64)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the examples; a last batch that is not full is left out."""
        return max(len(self._examples) // self._recipe.batch_size, 1)

    def advance(self, steps: int, schedule: Schedule) -> None:
        """Train for some steps; the network is left in evaluation mode."""
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            for _ in range(steps):
                for group in self._optimiser.param_groups:
                    group["lr"] = self._recipe.learning_rate * schedule(self.done)
                batch = self._examples.take(self._batch())
                torch.manual_seed(derived_seed(self._seed, _NOISE, self.done))
                loss = nn.functional.cross_entropy(self.model(batch.inputs), batch.targets)
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self.done += 1
        self.model.eval()

    def branch(self) -> Training:
        """A copy with all the optimiser's state, to be continued in another way."""
        model = copy.deepcopy(self.model)
        other = Training(model, self._examples, self._recipe, self._seed)
        other._optimiser.load_state_dict(copy.deepcopy(self._optimiser.state_dict()))
        other.done = self.done
        return other

    def _batch(self) -> Tensor:
        epoch, number = divmod(self.done, self.epoch_steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, _ORDER, epoch))
            self._order = torch.randperm(len(self._examples), generator=generator)
            self._epoch = epoch
        size = self._recipe.batch_size
        return self._order[number * size : (number + 1) * size]
