"""PVTv2 on three of PACS's domains, measured on the fourth (paper, table of domains)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.recipes.transfer import (
    ALL,
    PRETRAINING,
    RATE,
    STEPS,
    PictureTask,
    conditions,
    pictures,
)
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.tasks import Problem
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.lab.pictures import find_pictures
from know_cli.lab.pictures.layouts import Part
from know_cli.lab.pictures.registry import PACS, find_domains


@dataclass(frozen=True)
class LeftOut(PictureTask):
    """Classification in several domains, measured in another.

    Attributes:
        domain: that is measured, and that nothing is trained on or chosen by.
    """

    domain: str = ""

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Read both data sets; the seed draws the examples of the fine-tuning."""
        found = find_pictures(self.source, data_folder)
        domains = find_domains(data_folder)
        others = [part for name, part in domains.items() if name != self.domain]
        known = Part(
            [path for part in others for path in part.pictures],
            [label for part in others for label in part.labels],
        )
        targets = 1 + max(known.labels)
        side = self.side
        return Problem(
            pool=pictures(found.train, side, side),
            test=pictures(found.test, side, side),
            build=lambda number: self.build(found.classes, number),
            build_downstream=lambda number: self.build(targets, number),
            fresh=("classifier",),
            cells=self.cells(
                seed, pictures(known, side, side), pictures(domains[self.domain], side, side)
            ),
            pretraining_measure=ACCURACY,
            measure=ACCURACY,
        )


_FINE_TUNING = FineTuning()
_VALIDATION = 1000


def _task(name: str, domain: str) -> ReleaseTask:
    base = LeftOut(
        name=f"release-imagenet100-pacs-{name}-pvt",
        title=f"ImageNet-100 to PACS, measured on its domain {name}, PVTv2-B1",
        samples=130_000,
        recipe=PRETRAINING,
        downstream=conditions((1200, 2400, 4800), _FINE_TUNING),
        tested=ALL,
        large=True,
        target=PACS,
        validation=_VALIDATION,
        domain=domain,
    )
    return ReleaseTask(base, _FINE_TUNING, RATE, uses_all=True, steps=STEPS, validation=_VALIDATION)


TASKS = (
    _task("art", "art_painting"),
    _task("cartoon", "cartoon"),
    _task("photo", "photo"),
    _task("sketch", "sketch"),
)
