"""Scenes composed of Fashion-MNIST's images: segmentation and captioning."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from know_cli.evaluation.tasks.data import load_images, of_classes
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.measures import MEAN_IOU, TOKEN_ACCURACY, Measure
from know_cli.evaluation.tasks.networks import Captioner, Segmenter, seeded
from know_cli.evaluation.tasks.task import Cell, Downstream, Problem, Recipe, Task, permutation

#: Side of a scene and of an object, in pixels.
SIDE, OBJECT = 32, 14
_CLASSES = 5
_VISIBLE = 0.15
_ORDER, _POOL, _TEST, _TRAIN, _MEASURED = range(50, 55)
_COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.9, 0.2),
}
# Names of Fashion-MNIST's classes.
_NAMES = (
    "shirt", "trousers", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot",
)  # fmt: skip
_RELATIONS = ("left-of", "right-of", "above", "below")
_END, _START = "end", "start"
WORDS = (_END, _START, "a", "the", *_COLOURS, *_NAMES, *_RELATIONS)
#: Words of a caption: a, colour, name, relation, a, colour, name, end.
CAPTION = 8


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes of two coloured objects on a background.

    Attributes:
        images: ``[n, 3, 32, 32]`` float32, standardised.
        regions: ``[n, 32, 32]`` int64, the class of each pixel, 0 for the background.
        captions: ``[n, 8]`` int64, positions in :data:`WORDS`.
    """

    images: Tensor
    regions: Tensor
    captions: Tensor


def compose(
    objects: Examples, names: NDArray[np.int64], count: int, generator: np.random.Generator
) -> Scenes:
    """Draw scenes.

    Args:
        objects: standardised grey images ``[m, 1, H, W]`` with classes from 0.
        names: ``[k]``, each class's number in Fashion-MNIST.
        count: number of scenes.
        generator: of random numbers.
    """
    chosen = generator.integers(len(objects), size=(count, 2))
    small = nn.functional.interpolate(objects.inputs, (OBJECT, OBJECT), mode="bilinear")
    low, high = small.amin((2, 3), keepdim=True), small.amax((2, 3), keepdim=True)
    shares = ((small - low) / (high - low).clamp(min=1e-6))[:, 0].numpy()
    labels = objects.targets.numpy()
    palette = np.array(list(_COLOURS.values()), np.float32)
    images = generator.uniform(0.0, 0.6, (count, 3, 1, 1)) + generator.normal(
        0, 0.08, (count, 3, SIDE, SIDE)
    )
    regions = np.zeros((count, SIDE, SIDE), np.int64)
    captions = np.zeros((count, CAPTION), np.int64)
    word = {text: number for number, text in enumerate(WORDS)}
    colours = generator.integers(len(_COLOURS), size=(count, 2))
    relations = generator.integers(len(_RELATIONS), size=count)
    free = SIDE - 2 * OBJECT
    for scene in range(count):
        relation = _RELATIONS[relations[scene]]
        # One object per half, so that the relation holds and nothing is hidden.
        along = (generator.integers(free // 2 + 1), SIDE // 2 + generator.integers(free // 2 + 1))
        across = generator.integers(SIDE - OBJECT + 1, size=2)
        if relation in ("right-of", "below"):
            along = along[::-1]
        for number in range(2):
            row, column = int(across[number]), int(along[number])
            if relation in ("above", "below"):
                row, column = column, row
            rows, columns = slice(row, row + OBJECT), slice(column, column + OBJECT)
            share = shares[chosen[scene, number]]
            seen = share > _VISIBLE
            colour = palette[colours[scene, number], :, None, None]
            shaded = colour * (0.35 + 0.65 * share)
            view = images[scene, :, rows, columns]
            view[:] = np.where(seen, shaded, view)
            regions[scene, rows, columns][seen] = 1 + labels[chosen[scene, number]]
        first, second = (
            (
                word["a"],
                word[list(_COLOURS)[colours[scene, number]]],
                word[_NAMES[names[labels[chosen[scene, number]]]]],
            )
            for number in range(2)
        )
        captions[scene] = (*first, word[relation], *second, word[_END])
    standardised = torch.from_numpy((images.astype(np.float32) - 0.4) / 0.3)
    return Scenes(standardised, torch.from_numpy(regions), torch.from_numpy(captions))


@dataclass(frozen=True)
class _SceneTask(Task):
    """Scenes of five classes of Fashion-MNIST, then of the other five."""

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Fashion-MNIST."""
        return ("fashion-mnist",)

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw classes and scenes."""
        train, test, count = load_images("fashion-mnist", data_folder)
        order = permutation(count, seed, _ORDER)
        classes, others = order[:_CLASSES], order[_CLASSES : 2 * _CLASSES]
        most = max(downstream.size for downstream in self.downstream)

        def scenes(objects: Examples, of: Tensor, number: int, stream: int) -> Examples:
            generator = np.random.default_rng([seed, stream])
            return self._examples(compose(of_classes(objects, of), of.numpy(), number, generator))

        pool = scenes(train, classes, self.largest, _POOL)
        learned = scenes(train, others, 4 * most, _TRAIN)
        measured = scenes(test, others, self.tested, _MEASURED)
        return Problem(
            pool=pool,
            test=scenes(test, classes, self.tested, _TEST),
            build=lambda number: seeded(self._network, number),
            build_downstream=lambda number: seeded(self._network, number),
            fresh=self._fresh,
            cells=tuple(
                Cell(f"{downstream.size} scenes", downstream, learned, measured)
                for downstream in self.downstream
            ),
            pretraining_measure=self._measure,
            measure=self._measure,
        )

    _fresh: ClassVar[tuple[str, ...]]
    _measure: ClassVar[Measure]

    @abstractmethod
    def _examples(self, scenes: Scenes) -> Examples: ...

    @abstractmethod
    def _network(self) -> nn.Module: ...


@dataclass(frozen=True)
class Segmentation(_SceneTask):
    """Segmentation: the class of each pixel."""

    _fresh = ("head",)
    _measure = MEAN_IOU

    def _examples(self, scenes: Scenes) -> Examples:
        return Examples(scenes.images, scenes.regions)

    def _network(self) -> nn.Module:
        return Segmenter(_CLASSES + 1)


@dataclass(frozen=True)
class Captioning(_SceneTask):
    """Captioning: each word from the image and the words before it.

    Only colours, names and the relation count; the other words are always the same.
    """

    _fresh = ()
    _measure = TOKEN_ACCURACY

    def _examples(self, scenes: Scenes) -> Examples:
        start = torch.full((len(scenes.captions), 1), WORDS.index(_START))
        before = torch.cat([start, scenes.captions[:, :-1]], 1)
        same = [WORDS.index(word) for word in ("a", _END)]
        asked = ~torch.isin(scenes.captions, torch.tensor(same))
        # Networks have a single input: the pixels, then the words, which floats represent exactly.
        inputs = torch.cat([scenes.images.flatten(1), before.float()], 1)
        return Examples(inputs, torch.where(asked, scenes.captions, -100))

    def _network(self) -> nn.Module:
        return Captioner(len(WORDS), CAPTION, (3, SIDE, SIDE))


TASKS = (
    Segmentation(
        name="scenes-segmentation",
        title="segmented scenes of Fashion-MNIST's classes to scenes of others, an encoder and "
        "decoder with atrous pooling",
        samples=300,
        recipe=Recipe(30, 3e-3, batch_size=16),
        downstream=(
            Downstream(20, 30, 4e-3, repetitions=1),
            Downstream(80, 15, 4e-3, repetitions=1),
        ),
        tested=300,
    ),
    Captioning(
        name="scenes-captioning",
        title="captioned scenes of Fashion-MNIST's classes to scenes of others, an image encoder "
        "and a small transformer",
        samples=800,
        recipe=Recipe(30, 3e-3),
        downstream=(Downstream(50, 20, repetitions=1), Downstream(200, 12, repetitions=1)),
        tested=500,
    ),
)
