"""CIFAR-10 in miniature: pre-training on five of its classes, fine-tuning on the other five."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from know_cli.evaluation.tasks.classification import BACKBONES, Classification, ResNet18Network
from know_cli.evaluation.tasks.data import load_images
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.task import Downstream, Recipe

_DATA_SET = "cifar10"
_CLASSES = 5


@dataclass(frozen=True)
class Reduced(Classification):
    """Classification of images reduced to a smaller side, each pixel the mean of a square of them.

    Attributes:
        factor: how many pixels of a side become one.
    """

    factor: int = 2

    def load(self, name: str, data_folder: Path | None) -> tuple[Examples, Examples, int]:
        """Training and test examples with reduced images, and the number of classes."""
        train, test, count = load_images(name, data_folder)
        return self._reduced(train), self._reduced(test), count

    def _reduced(self, examples: Examples) -> Examples:
        return Examples(nn.functional.avg_pool2d(examples.inputs, self.factor), examples.targets)


@dataclass(frozen=True)
class Whole(Classification):
    """Classification with all images of data sets that no shipped hyper-model was taught on."""

    def load(self, name: str, data_folder: Path | None) -> tuple[Examples, Examples, int]:
        """Training and test examples, and the number of classes."""
        return load_images(name, data_folder, whole=True)


TASKS = tuple(
    Reduced(
        name=f"cifar10-classes-{name}",
        title=f"five classes of CIFAR-10 at 16×16 to the other five, {BACKBONES[name].title}",
        samples=1000,
        recipe=BACKBONES[name].recipe,
        downstream=tuple(
            Downstream(size, epochs, BACKBONES[name].downstream_rate, repetitions)
            for size, epochs, repetitions in ((50, 20, 2), (200, 10, 1))
        ),
        network=BACKBONES[name].network,
        source=_DATA_SET,
        source_classes=_CLASSES,
        target=_DATA_SET,
        target_classes=_CLASSES,
    )
    for name in ("resnet", "vit")
)
# One step up in scale: two hundred times as many parameters, of which the images are as few.
LARGE_TASKS = (
    Reduced(
        name="cifar10-classes-resnet18",
        title="five classes of CIFAR-10 at 16×16 to the other five, ResNet18",
        samples=600,
        recipe=Recipe(10, 1e-3),
        downstream=(Downstream(50, 20, 1e-3, 1), Downstream(200, 10, 1e-3, 1)),
        large=True,
        network=ResNet18Network(),
        source=_DATA_SET,
        source_classes=_CLASSES,
        target=_DATA_SET,
        target_classes=_CLASSES,
    ),
)
