"""PVTv2 from ImageNet's pictures to those of smaller data sets (paper, table of five data sets)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from know_cli.errors import UsageError
from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.recipes.networks import pvt_classifier
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.tasks import Cell, Downstream, Examples, Problem, Recipe, Task
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.evaluation.tasks.task import permutation
from know_cli.lab.data import DATA_SETS, load
from know_cli.lab.pictures import decoded_pictures, find_pictures
from know_cli.lab.pictures.layouts import Part

#: Data set of every pre-training here.
SOURCE = "imagenet-100"
#: Pixels of a side, as public checkpoints were trained with.
SIDE = 224
#: Everything of a test set.
ALL = 1_000_000
#: Of the pre-training, unless a checkpoint is given: an epoch, as the release has it.
PRETRAINING = Recipe(1, 1e-3, batch_size=128, weight_decay=0.0, schedule="constant")
#: |D(k + 1)| / |D(k)| of the paper's larger experiments, and its steps there: x3 and x9.
RATE, STEPS = 1 / 3, (1, 2)
_ENLARGED_ROWS = 2000


def pictures(part: Part, height: int, width: int) -> Examples:
    """The pictures of a part, uint8 ``[n, 3, height, width]``, with their classes."""
    part = part.mixed()  # what takes the first of them is not to take one class
    return Examples(decoded_pictures(part.pictures, height, width), torch.tensor(list(part.labels)))


def conditions(shares: tuple[int, int, int], fine_tuning: FineTuning) -> tuple[Downstream, ...]:
    """Downstream conditions of so many examples."""
    return tuple(
        Downstream(size, fine_tuning.epochs, fine_tuning.learning_rate, 1) for size in shares
    )


@dataclass(frozen=True)
class PictureTask(Task):
    """A pre-training on the pictures of a folder, with all of them.

    Attributes:
        source: data set of the pre-training, whose classes keep their order, so that a public
            checkpoint's head fits.
        target: data set of the fine-tuning.
        side: of a picture, in pixels.
        validation: examples for the choice of the rate.
    """

    source: str = SOURCE
    target: str = ""
    side: int = SIDE
    validation: int = 2000

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The data sets of pre-training and fine-tuning."""
        return (self.source, self.target)

    def build(self, classes: int, seed: int) -> nn.Module:
        """The network that is pre-trained."""
        return pvt_classifier(classes, seed)

    def cells(self, seed: int, pool: Examples, test: Examples) -> tuple[Cell, ...]:
        """The downstream conditions, all drawn from one pool.

        Raises:
            UsageError: it has too few examples.
        """
        needed = max(one.size for one in self.downstream) + self.validation
        if len(pool) < needed:
            raise UsageError(
                f"task {self.name}: needs {needed:,} training pictures, data set "
                f"{self.target!r} has {len(pool):,}"
            )
        pool = pool.take(permutation(len(pool), seed))
        return tuple(Cell(f"{one.size} images", one, pool, test) for one in self.downstream)


@dataclass(frozen=True)
class Transfer(PictureTask):
    """Classification of pictures, then of others."""

    def load(self, name: str, data_folder: Path | None) -> tuple[Examples, Examples, int]:
        """Training and test pictures of a data set, and the number of its classes."""
        if name not in DATA_SETS:
            found = find_pictures(name, data_folder)
            train, test = (pictures(p, self.side, self.side) for p in (found.train, found.test))
            return train, test, found.classes
        data = load(name, data_folder)
        train, test = (
            Examples(_enlarged(part.inputs, self.side), part.labels)
            for part in (data.train, data.test)
        )
        return train, test, data.classes

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Read both data sets; the seed draws the examples of the fine-tuning."""
        pool, test, classes = self.load(self.source, data_folder)
        train, tested, targets = self.load(self.target, data_folder)
        return Problem(
            pool=pool,
            test=test,
            build=lambda number: self.build(classes, number),
            build_downstream=lambda number: self.build(targets, number),
            fresh=("classifier",),
            cells=self.cells(seed, train, tested),
            pretraining_measure=ACCURACY,
            measure=ACCURACY,
        )


def _enlarged(images: torch.Tensor, side: int) -> torch.Tensor:
    """Small images ``[n, 3, h, w]`` uint8 at another size."""
    parts = [
        nn.functional.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        .round()
        .byte()
        for part in torch.split(images, _ENLARGED_ROWS)
    ]
    return torch.cat(parts)


_FINE_TUNING = FineTuning()


def _task(
    name: str, target: str, title: str, shares: tuple[int, int, int], validation: int
) -> ReleaseTask:
    base = Transfer(
        name=f"release-imagenet100-{name}-pvt",
        title=f"ImageNet-100 to {title}, PVTv2-B1",
        samples=130_000,
        recipe=PRETRAINING,
        downstream=conditions(shares, _FINE_TUNING),
        tested=ALL,
        large=True,
        target=target,
        validation=validation,
    )
    return ReleaseTask(base, _FINE_TUNING, RATE, uses_all=True, steps=STEPS, validation=validation)


TASKS = (
    _task("cifar100", "cifar100", "CIFAR-100", (12_000, 24_000, 48_000), 2000),
    _task("tiny", "tiny-imagenet-200", "TinyImageNet", (24_500, 49_000, 98_000), 2000),
    _task("cars", "stanford-cars", "Stanford Cars", (1780, 3560, 7120), 1000),
    _task("cub", "CUB_200_2011", "CUB", (1248, 2496, 4992), 1000),
    _task("flowers", "flowers-102", "Oxford Flowers", (410, 820, 1640), 400),
)
