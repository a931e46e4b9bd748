"""DeepLabV3+ from Pascal VOC to Cityscapes (paper, table of segmentation)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.recipes.networks import deep_lab
from know_cli.evaluation.release.recipes.transfer import (
    ALL,
    PRETRAINING,
    RATE,
    STEPS,
    PictureTask,
    conditions,
)
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.tasks import Examples, Problem
from know_cli.evaluation.tasks.measures import MEAN_IOU
from know_cli.lab.data import UNCHANGED
from know_cli.lab.pictures import decoded_classes, decoded_pictures, find_pictures
from know_cli.lab.pictures.decoding import IGNORED
from know_cli.lab.pictures.layouts import Part

_LEVELS = 256
# VOC's numbers are classes, but for borders, 255; of Cityscapes' 34 sorts of things 19 are asked.
_VOC = [*range(21), *[IGNORED] * (_LEVELS - 21)]
_ASKED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES = [_ASKED.index(number) if number in _ASKED else IGNORED for number in range(_LEVELS)]


@dataclass(frozen=True)
class Segmentation(PictureTask):
    """Classes of pixels, first of things, then of streets; those are twice as wide as high."""

    def build(self, classes: int, seed: int) -> nn.Module:
        """The network that is pre-trained."""
        return deep_lab(classes, seed)

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Read both data sets; the seed draws the examples of the fine-tuning."""
        first, second = (find_pictures(name, data_folder) for name in self.data_sets)
        side = self.side

        def maps(part: Part, width: int, table: list[int]) -> Examples:
            part = part.mixed()
            return Examples(
                decoded_pictures(part.pictures, side, width),
                decoded_classes(part.labels, side, width, table),
            )

        return Problem(
            pool=maps(first.train, side, _VOC),
            test=maps(first.test, side, _VOC),
            build=lambda number: self.build(first.classes, number),
            build_downstream=lambda number: self.build(second.classes, number),
            fresh=("segmentation_head",),
            cells=self.cells(
                seed,
                maps(second.train, 2 * side, _CITYSCAPES),
                maps(second.test, 2 * side, _CITYSCAPES),
            ),
            pretraining_measure=MEAN_IOU,
            measure=MEAN_IOU,
        )


_FINE_TUNING = FineTuning(batch_size=16)
_VALIDATION = 175
TASKS = (
    ReleaseTask(
        Segmentation(
            name="release-voc-cityscapes-deeplab",
            title="Pascal VOC to Cityscapes at 256 by 512 pixels, DeepLabV3+ on a ResNet50",
            samples=1464,
            recipe=replace(PRETRAINING, batch_size=8),
            downstream=conditions((700, 1400, 2800), _FINE_TUNING),
            tested=ALL,
            large=True,
            source="VOC2012",
            target="cityscapes",
            side=256,
            validation=_VALIDATION,
        ),
        _FINE_TUNING,
        RATE,
        uses_all=True,
        augmentation=UNCHANGED,  # maps would have to be changed with their pictures
        steps=STEPS,
        validation=_VALIDATION,
    ),
)
