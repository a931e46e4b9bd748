"""Fine-tuning as the release does it, and the search for the rate that suits a start."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from know_cli.evaluation.tasks import Examples
from know_cli.forgetting.recorder import derived_seed
from know_cli.lab.data import AFFINE, AUGMENTATIONS, UNCHANGED
from know_cli.lab.fitting import Augmentation
from know_cli.lab.stepping import Training

#: Factors of the release's rate that every start is fine-tuned at.
GRID = (1.0, 2.0, 4.0, 8.0)
#: How many factors are to be tried on either side of the best: scores are noisy, and the first that
#: is lower may be so by chance.
MARGIN = 2
#: Beyond these factors nothing is tried, whatever the scores are.
LOWEST, HIGHEST = 2.0**-8, 2.0**12
# Random streams of one fine-tuning.
_HEAD, _ALL = range(2)


@dataclass(frozen=True)
class FineTuning:
    """How a start is fine-tuned: first normalisation layers and head, then everything.

    Attributes:
        learning_rate: the release's, from which it falls to 0 along half a cosine.
        optimiser: of the second phase, as in :data:`~know_cli.lab.fitting.OPTIMISERS`.
        weight_decay: of the second phase.
        epochs: of the second phase.
        head_epochs: of the first, by Adam at the constant rate ``head_rate``.
        head_rate: of the first phase.
        batch_size: samples per step.
    """

    learning_rate: float = 4e-4
    optimiser: str = "adam"
    weight_decay: float = 0.0
    epochs: int = 30
    head_epochs: int = 3
    head_rate: float = 1e-3
    batch_size: int = 128


class FineTunings:
    """Fine-tunings of one start at several rates, which share their first phase.

    Args:
        recipe: of all of them.
        model: the start, with a fresh head; trained in place by the first phase.
        fresh: names of the modules that are fresh.
        examples: images ``[n, C, H, W]`` to train on.
        seed: of order and augmentation, the same at every rate.
        augmentation: of the images.
    """

    def __init__(
        self,
        recipe: FineTuning,
        model: nn.Module,
        fresh: Sequence[str],
        examples: Examples,
        seed: int,
        augmentation: Augmentation,
    ) -> None:
        self._augmentation = augmentation
        self._recipe, self._model, self._fresh = recipe, model, tuple(fresh)
        self._examples, self._seed = examples, seed
        self._is_warm = False

    def at(self, factor: float) -> nn.Module:
        """The network fine-tuned at a multiple of the recipe's rate, in evaluation mode."""
        if not self._is_warm:
            self._warm_up()
            self._is_warm = True
        recipe = self._recipe
        training = self._training(
            copy.deepcopy(self._model), factor * recipe.learning_rate, _ALL,
            optimiser=recipe.optimiser, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        total = recipe.epochs * training.epoch_steps
        training.advance(total, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
        return training.model

    def _warm_up(self) -> None:
        parameters = list(self._model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(False)
        for name, module in self._model.named_modules():
            if isinstance(module, _BatchNorm) or name in self._fresh:
                for parameter in module.parameters():
                    parameter.requires_grad_(True)
        training = self._training(self._model, self._recipe.head_rate, _HEAD)
        training.advance(self._recipe.head_epochs * training.epoch_steps, lambda step: 1.0)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def _training(
        self,
        model: nn.Module,
        rate: float,
        stream: int,
        optimiser: str = "adam",
        weight_decay: float = 0.0,
    ) -> Training:
        return Training(
            model,
            self._examples.inputs,
            self._examples.targets,
            batch_size=self._recipe.batch_size,
            learning_rate=rate,
            seed=derived_seed(self._seed, stream),
            optimiser=optimiser,
            weight_decay=weight_decay,
            augmentation=self._augmentation,
        )


def shifted_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by up to an eighth of their side, and flipped."""
    every = AUGMENTATIONS["image"]
    return every["flip"](every["shift"](images, generator), generator)


#: By the name that a task gives.
FINE_TUNING_AUGMENTATIONS: Mapping[str, Augmentation] = {
    "": shifted_and_flipped,
    UNCHANGED: AUGMENTATIONS["image"][UNCHANGED],
    AFFINE: AUGMENTATIONS["image"][AFFINE],
}


def tuned(score: Callable[[float], float]) -> tuple[float, Mapping[float, float]]:
    """The factor of the rate with the highest score, from a grid that it is well inside of.

    The grid grows by a factor of 2 at the end that the best is near, until there are
    :data:`MARGIN` factors beyond the best, or until :data:`LOWEST` or :data:`HIGHEST` is reached.

    Args:
        score: of a factor, on validation examples; called once for each.

    Returns:
        The best factor, the lowest of equal ones; and the scores, by factor in rising order.

    >>> tuned(lambda factor: -abs(factor - 16))[0]
    16.0
    """
    scores = {factor: score(factor) for factor in GRID}
    while True:
        best = max(sorted(scores), key=lambda factor: scores[factor])
        lowest, highest = min(scores), max(scores)
        if highest < min(best * 2**MARGIN, HIGHEST):
            scores[2 * highest] = score(2 * highest)
        elif lowest > max(best / 2**MARGIN, LOWEST):
            scores[lowest / 2] = score(lowest / 2)
        else:
            return best, dict(sorted(scores.items()))


def refresh(model: nn.Module) -> None:
    """Give every BatchNorm layer of a network the values that a new one has."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a network has a BatchNorm layer."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
