"""PVTv2's features for captions of Flickr8k's pictures (paper, masked accuracy)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from know_cli.evaluation.release.fine_tuning import FineTuning
from know_cli.evaluation.release.recipes.networks import PvtCaptioner, pvt_captioner
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
from know_cli.evaluation.tasks import Examples, Problem
from know_cli.evaluation.tasks.measures import ACCURACY, TOKEN_ACCURACY
from know_cli.lab.data import UNCHANGED
from know_cli.lab.pictures import decoded_pictures, find_pictures
from know_cli.lab.pictures.decoding import IGNORED
from know_cli.lab.pictures.layouts import Part

#: Words of a caption with its end, and captions of a picture; longer and further ones are cut off.
LENGTH, CAPTIONS = 24, 5
# Rarer words are one word.
_FEWEST = 5
_END, _RARE = 0, 1
_WORD = re.compile(r"[a-z0-9']+")


def vocabulary(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """Numbers of the words that are frequent in captions, after those of the end and of rare ones.

    >>> vocabulary([["A dog.", "a dog"], ["a dog runs", "a dog", "A  DOG!"]])
    {'a': 2, 'dog': 3}
    """
    counts = Counter(word for of in captions for text in of for word in _words(text))
    frequent = sorted(word for word, count in counts.items() if count >= _FEWEST)
    return {word: number for number, word in enumerate(frequent, 2)}


def numbered(captions: Sequence[Sequence[str]], words: Mapping[str, int]) -> torch.Tensor:
    """Captions as numbers, int64 ``[n, CAPTIONS, LENGTH]``; what is missing is :data:`IGNORED`."""
    found = torch.full((len(captions), CAPTIONS, LENGTH), IGNORED)
    for row, texts in zip(found, captions, strict=True):
        for line, text in zip(row, texts[:CAPTIONS], strict=False):
            numbers = [words.get(word, _RARE) for word in _words(text)][: LENGTH - 1]
            line[: len(numbers) + 1] = torch.tensor([*numbers, _END])
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Captions(PictureTask):
    """Classification of pictures, then captions of others, whose words are said one by one."""

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Read both data sets; the seed draws the examples of the fine-tuning."""
        first, second = (find_pictures(name, data_folder) for name in self.data_sets)
        side = self.side
        words = vocabulary(second.train.labels)

        def described(part: Part) -> Examples:
            targets = numbered(part.labels, words)
            # Each word is asked for after those before it; the end stands before the first, too.
            before = torch.full_like(targets, _END)
            before[..., 1:] = targets[..., :-1].clamp(min=_END)
            pixels = decoded_pictures(part.pictures, side, side).flatten(1)
            inputs = torch.cat([pixels.short(), before.flatten(1).short()], 1)
            return Examples(inputs, targets.flatten(1))

        return Problem(
            pool=pictures(first.train, side, side),
            test=pictures(first.test, side, side),
            build=lambda number: self.build(first.classes, number),
            build_downstream=lambda number: pvt_captioner(
                len(words) + 2, LENGTH, (3, side, side), number
            ),
            fresh=PvtCaptioner.FRESH,
            cells=self.cells(seed, described(second.train), described(second.test)),
            pretraining_measure=ACCURACY,
            measure=TOKEN_ACCURACY,
        )


_FINE_TUNING = FineTuning(batch_size=64)
_VALIDATION = 500
TASKS = (
    ReleaseTask(
        Captions(
            name="release-imagenet100-flickr8k-pvt",
            title="ImageNet-100 to captions of Flickr8k, PVTv2-B1 with a transformer's decoder",
            samples=130_000,
            recipe=PRETRAINING,
            downstream=conditions((1600, 3200, 6400), _FINE_TUNING),
            tested=ALL,
            large=True,
            target="flickr8k",
            validation=_VALIDATION,
        ),
        _FINE_TUNING,
        RATE,
        uses_all=True,
        augmentation=UNCHANGED,  # words are among the inputs
        steps=STEPS,
        validation=_VALIDATION,
    ),
)
