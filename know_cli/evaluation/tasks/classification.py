"""Classification: pre-trained on some classes of images, fine-tuned on others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from know_cli.errors import UsageError
from know_cli.evaluation.tasks.data import load_images, of_classes, resized
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.evaluation.tasks.task import (
    Cell,
    Downstream,
    Examples,
    Problem,
    Recipe,
    Task,
    permutation,
)
from know_cli.meta.zoo import Design, Inputs, build

# Streams of random numbers of one seed.
_CLASSES, _TARGET_CLASSES, _POOL, _TEST, _TARGET_TEST, _SMALL = range(6)


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        architecture: its name there.
        options: those that are not the first of their choices.
    """

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    def design(self, shape: tuple[int, ...], classes: int) -> Design:
        """The network for images of a shape."""
        return Design(self.architecture, Inputs("image", shape), classes, self.options)


@dataclass(frozen=True)
class Classification(Task):
    """From classes of one data set to other classes of the same, or to those of another.

    Which classes are drawn for what depends on the seed.

    Attributes:
        network: what is trained.
        source: data set of the pre-training.
        source_classes: how many of its classes the pre-training has.
        target: data set of the fine-tuning.
        target_classes: how many of its classes that has.
    """

    network: Network = Network("cnn")
    source: str = ""
    source_classes: int = 0
    target: str = ""
    target_classes: int = 0

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Those of the pre-training and the fine-tuning."""
        return tuple(dict.fromkeys((self.source, self.target)))

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw classes, samples and test samples."""
        train, test, count = load_images(self.source, data_folder)
        order = permutation(count, seed, _CLASSES)
        classes, others = order[: self.source_classes], order[self.source_classes :]
        shape = tuple(train.inputs.shape[1:])
        pool = _some(of_classes(train, classes), self.largest, seed, _POOL)
        if len(pool) < self.largest:
            raise UsageError(
                f"task {self.name}: needs {self.largest} training images of "
                f"{self.source_classes} classes, data set {self.source!r} has {len(pool)}"
            )
        network = self.network
        return Problem(
            pool=pool,
            test=_some(of_classes(test, classes), self.tested, seed, _TEST),
            build=lambda number: build(network.design(shape, self.source_classes), number),
            build_downstream=lambda number: build(
                network.design(shape, self.target_classes), number
            ),
            fresh=("head",),
            cells=self._cells(seed, data_folder, others, shape),
            pretraining_measure=ACCURACY,
            measure=ACCURACY,
        )

    def _cells(
        self, seed: int, data_folder: Path | None, others: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[Cell, ...]:
        train, test, count = load_images(self.target, data_folder)
        classes = others[: self.target_classes]
        if self.target != self.source:
            classes = permutation(count, seed, _TARGET_CLASSES)[: self.target_classes]
        train = resized(of_classes(train, classes), shape)
        if len(test):
            test = resized(of_classes(test, classes), shape)
        else:
            # A small set, divided anew for each seed.
            drawn = permutation(len(train), seed, _SMALL)
            size = max(downstream.size for downstream in self.downstream)
            train, test = train.take(drawn[:size]), train.take(drawn[size:])
        test = _some(test, self.tested, seed, _TARGET_TEST)
        return tuple(
            Cell(f"{downstream.size} images", downstream, train, test)
            for downstream in self.downstream
        )


def _some(examples: Examples, count: int, seed: int, stream: int) -> Examples:
    return examples.take(permutation(len(examples), seed, stream)[:count])


_CNN = {
    "width": 16, "depth": 3, "kernel": 3, "stem_stride": 2, "activation": "relu",
    "bias": True, "pooling": "maximum", "hidden": 64,
}  # fmt: skip
_NETWORKS = {
    "cnn": (
        "a CNN without normalisation",
        Network("cnn", {**_CNN, "norm": "none"}),
        Recipe(60, 1e-3),
    ),
    "cnn-batchnorm": (
        "a CNN with BatchNorm",
        Network("cnn", {**_CNN, "norm": "batch"}),
        Recipe(40, 1e-3),
    ),
    "resnet": (
        "a ResNet",
        Network("resnet", {"width": 12, "blocks": 1}),
        Recipe(40, 2e-3),
    ),
    "mobilenetv2": (
        "a MobileNetV2",
        Network("mobilenetv2", {"width": 12, "blocks": 1, "expansion": 3}),
        Recipe(40, 2e-3),
    ),
    "vit": (
        "a vision transformer",
        Network("vit", {"heads": 3, "head_width": 12, "depth": 2, "mlp_ratio": 2}),
        Recipe(60, 1e-3),
    ),
    "pyramid": (
        "a pyramid transformer",
        Network("pyramid", {"width": 16}),
        Recipe(60, 1e-3),
    ),
}
_DOWNSTREAM = (Downstream(20, 40), Downstream(50, 30), Downstream(200, 15))
# Of the digits 899 are here, and most of them are needed to measure on.
_DIGITS_DOWNSTREAM = (Downstream(30, 40), Downstream(60, 30), Downstream(120, 20))


def _task(
    prefix: str,
    network: str,
    title: str,
    source: tuple[str, int],
    target: tuple[str, int],
    downstream: tuple[Downstream, ...],
    samples: int = 800,
) -> Classification:
    words, of_zoo, recipe = _NETWORKS[network]
    return Classification(
        name=f"{prefix}-{network}",
        title=f"{title}, {words}",
        samples=samples,
        recipe=recipe,
        downstream=downstream,
        network=of_zoo,
        source=source[0],
        source_classes=source[1],
        target=target[0],
        target_classes=target[1],
    )


TASKS = (
    *(
        _task(
            "fashion-classes",
            network,
            "five classes of Fashion-MNIST to the other five",
            ("fashion-mnist", 5),
            ("fashion-mnist", 5),
            _DOWNSTREAM,
        )
        for network in _NETWORKS
    ),
    *(
        _task(
            "fashion-digits",
            network,
            "Fashion-MNIST to scikit-learn's digits",
            ("fashion-mnist", 10),
            ("digits", 10),
            _DIGITS_DOWNSTREAM,
        )
        for network in ("cnn", "resnet")
    ),
    *(
        _task(
            "glyphs-digits",
            network,
            "Latin letters to scikit-learn's digits",
            ("glyphs-latin", 5),
            ("digits", 10),
            _DIGITS_DOWNSTREAM,
            samples=500,
        )
        for network in ("cnn-batchnorm",)
    ),
    *(
        _task(
            "glyphs-alphabets",
            network,
            "Latin letters to Greek letters",
            ("glyphs-latin", 5),
            ("glyphs-greek", 5),
            (Downstream(50, 30), Downstream(100, 25), Downstream(400, 12)),
            samples=500,
        )
        for network in ("cnn", "resnet")
    ),
)
