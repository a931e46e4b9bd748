"""Classification: pre-training on some classes of images, fine-tuning on others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from know_cli.errors import UsageError
from know_cli.evaluation.tasks.appearance import in_domain
from know_cli.evaluation.tasks.data import load_images, of_classes, resized
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.evaluation.tasks.networks import ResNet18, seeded
from know_cli.evaluation.tasks.task import Cell, Downstream, Problem, Recipe, Task, permutation
from know_cli.lab.zoo import Design, Inputs, build

# Random streams of one seed.
_CLASSES, _TARGET_CLASSES, _POOL, _TEST, _TARGET_TEST, _TARGET, _CHANGES = range(7)


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        architecture: its name in the zoo.
        options: those that differ from the defaults.
    """

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """The network for images of a shape, with initial weights from a seed."""
        return build(Design(self.architecture, Inputs("image", shape), classes, self.options), seed)


@dataclass(frozen=True)
class ResNet18Network(Network):
    """ResNet18, which is wider than the networks of the zoo."""

    architecture: str = "resnet18"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """The network for images of a shape, with initial weights from a seed."""
        return seeded(lambda: ResNet18(shape[0], classes), seed)


_CNN_NETWORK = Network("cnn")


@dataclass(frozen=True)
class Classification(Task):
    """Transfer from classes of one data set to its other classes, or to classes of another.

    The seed decides which classes are drawn for which.

    Attributes:
        network: to train.
        source: data set of the pre-training.
        source_classes: number of its classes.
        target: data set of the fine-tuning.
        target_classes: number of its classes.
        source_domain: appearance of the source's greyscale images, a name in
            :data:`~know_cli.evaluation.tasks.appearance.DOMAINS`; empty for none.
        target_domain: likewise for the target.
    """

    network: Network = _CNN_NETWORK
    source: str = ""
    source_classes: int = 0
    target: str = ""
    target_classes: int = 0
    source_domain: str = ""
    target_domain: str = ""

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The data sets of pre-training and fine-tuning."""
        return tuple(dict.fromkeys((self.source, self.target)))

    def load(self, name: str, data_folder: Path | None) -> tuple[Examples, Examples, int]:
        """Training and test examples of a data set, and its number of classes."""
        return load_images(name, data_folder)

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw classes, samples and test samples."""
        train, test, count = self.load(self.source, data_folder)
        order = permutation(count, seed, _CLASSES)
        classes, others = order[: self.source_classes], order[self.source_classes :]
        pool = some(of_classes(train, classes), self.largest, seed, _POOL)
        pool = _as_seen(pool, self.source_domain, seed, 0)
        shape = tuple(pool.inputs.shape[1:])
        if len(pool) < self.largest:
            raise UsageError(
                f"task {self.name}: needs {self.largest} training images of "
                f"{self.source_classes} classes, data set {self.source!r} has {len(pool)}"
            )
        network = self.network
        return Problem(
            pool=pool,
            test=_as_seen(
                some(of_classes(test, classes), self.tested, seed, _TEST),
                self.source_domain,
                seed,
                1,
            ),
            build=lambda number: network.build(shape, self.source_classes, number),
            build_downstream=lambda number: network.build(shape, self.target_classes, number),
            fresh=("head",),
            cells=self._cells(seed, data_folder, others, shape),
            pretraining_measure=ACCURACY,
            measure=ACCURACY,
        )

    def further_splits(self, seed: int, data_folder: Path | None, count: int) -> list[Examples]:
        """Training examples of other classes of the source: as many in each split, none in two.

        Args:
            seed: as for :meth:`prepare`, whose classes are none of these.
            data_folder: where the data sets' files are.
            count: of splits.

        Raises:
            UsageError: the source has too few classes.
        """
        train, _, classes = self.load(self.source, data_folder)
        order = permutation(classes, seed, _CLASSES)
        size = self.source_classes
        if (count + 1) * size > classes:
            raise UsageError(
                f"task {self.name}: {count} further splits of {size} classes need "
                f"{(count + 1) * size} classes, data set {self.source!r} has {classes}"
            )
        return [
            _as_seen(
                some(of_classes(train, order[k * size : (k + 1) * size]), len(train), seed, _POOL),
                self.source_domain,
                seed,
                0,
            )
            for k in range(1, count + 1)
        ]

    def _cells(
        self, seed: int, data_folder: Path | None, others: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[Cell, ...]:
        train, test, count = self.load(self.target, data_folder)
        classes = others[: self.target_classes]
        if self.target != self.source:
            classes = permutation(count, seed, _TARGET_CLASSES)[: self.target_classes]
        most = max(downstream.size for downstream in self.downstream)
        train = some(of_classes(train, classes), len(train), seed, _TARGET)
        if len(test):
            test = of_classes(test, classes)
            train = train.take(torch.arange(min(4 * most, len(train))))
        else:
            # A small set, which each seed divides differently.
            every = torch.arange(len(train))
            train, test = train.take(every[:most]), train.take(every[most:])
        test = some(test, self.tested, seed, _TARGET_TEST)
        parts = []
        for number, part in enumerate((train, test), 2):
            large = resized(part, (part.inputs.shape[1], *shape[1:]))
            parts.append(resized(_as_seen(large, self.target_domain, seed, number), shape))
        train, test = parts
        return tuple(
            Cell(f"{downstream.size} images", downstream, train, test)
            for downstream in self.downstream
        )


def _as_seen(examples: Examples, domain: str, seed: int, number: int) -> Examples:
    return in_domain(examples, domain, seed, _CHANGES, number) if domain else examples


def some(examples: Examples, count: int, seed: int, stream: int) -> Examples:
    """At most ``count`` of the examples, in an order that the seed determines."""
    return examples.take(permutation(len(examples), seed, stream)[:count])


_CNN = {
    "width": 16, "depth": 3, "kernel": 3, "stem_stride": 2, "activation": "relu",
    "bias": True, "pooling": "maximum", "hidden": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A network and how it is trained.

    Attributes:
        title: in words.
        network: of the zoo.
        recipe: of the pre-training.
        downstream_rate: initial learning rate of the fine-tuning: of 0.5, 1, 2 and 4 times 1e-3,
            the best for Θ0 on seeds that are not evaluated. With a rate that is too low, anything
            that makes the same rate take larger steps, such as smaller weights before a
            normalisation, would look like a gain.
    """

    title: str
    network: Network
    recipe: Recipe
    downstream_rate: float


#: Backbones by name.
BACKBONES = {
    "cnn": Backbone(
        "a CNN without normalisation",
        Network("cnn", {**_CNN, "norm": "none"}),
        Recipe(50, 1e-3),
        2e-3,
    ),
    "cnn-batchnorm": Backbone(
        "a CNN with BatchNorm",
        Network("cnn", {**_CNN, "norm": "batch"}),
        Recipe(30, 1e-3),
        2e-3,
    ),
    "resnet": Backbone(
        "a ResNet",
        Network("resnet", {"width": 12, "blocks": 1}),
        Recipe(30, 2e-3),
        4e-3,
    ),
    "mobilenetv2": Backbone(
        "a MobileNetV2",
        Network("mobilenetv2", {"width": 12, "blocks": 1, "expansion": 3}),
        Recipe(30, 2e-3),
        4e-3,
    ),
    "vit": Backbone(
        "a vision transformer",
        Network("vit", {"heads": 3, "head_width": 12, "depth": 2, "mlp_ratio": 2}),
        Recipe(80, 2e-3),
        1e-3,
    ),
    "pyramid": Backbone(
        "a pyramid transformer",
        Network("pyramid", {"width": 16}),
        Recipe(70, 1e-3),
        2e-3,
    ),
}
# Sizes, epochs and repetitions of fine-tuning.
_DOWNSTREAM = ((20, 30, 2), (50, 20, 2), (200, 10, 1))
# There are 899 digits here, and most of them are needed for testing.
_DIGITS_DOWNSTREAM = ((20, 30, 2), (50, 20, 2))
_COLOURED_DIGITS_DOWNSTREAM = ((100, 30, 1), (300, 15, 1))
_GLYPHS_DOWNSTREAM = ((100, 15, 2), (300, 10, 1))


def _task(
    prefix: str,
    network: str,
    title: str,
    source: tuple[str, int],
    target: tuple[str, int],
    downstream: tuple[tuple[int, int, int], ...],
    samples: int = 500,
    domains: tuple[str, str] = ("colour", "colour"),
) -> Classification:
    backbone = BACKBONES[network]
    return Classification(
        name=f"{prefix}-{network}",
        title=f"{title}, {backbone.title}",
        samples=samples,
        recipe=backbone.recipe,
        downstream=tuple(
            Downstream(size, epochs, backbone.downstream_rate, repetitions)
            for size, epochs, repetitions in downstream
        ),
        network=backbone.network,
        source=source[0],
        source_classes=source[1],
        target=target[0],
        target_classes=target[1],
        source_domain=domains[0],
        target_domain=domains[1],
    )


TASKS = (
    *(
        _task(
            "fashion-classes",
            network,
            "five classes of Fashion-MNIST in colours to the other five",
            ("fashion-mnist", 5),
            ("fashion-mnist", 5),
            _DOWNSTREAM,
        )
        for network in BACKBONES
    ),
    *(
        _task(
            "fashion-digits",
            network,
            "Fashion-MNIST in colours to scikit-learn's digits in colours",
            ("fashion-mnist", 10),
            ("digits", 10),
            _COLOURED_DIGITS_DOWNSTREAM,
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
            domains=("", ""),
        )
        for network in ("cnn-batchnorm",)
    ),
    Classification(
        name="cifar100-cifar10-resnet18",
        title="CIFAR-100 to CIFAR-10, ResNet18",
        samples=12_500,
        recipe=Recipe(60, 1e-3, batch_size=128),
        downstream=(
            Downstream(1000, 40, repetitions=1),
            Downstream(5000, 30, repetitions=1),
        ),
        tested=10_000,
        large=True,
        network=ResNet18Network(),
        source="cifar100",
        source_classes=100,
        target="cifar10",
        target_classes=10,
    ),
    *(
        _task(
            "glyphs-alphabets",
            network,
            "Latin letters to Greek letters",
            ("glyphs-latin", 5),
            ("glyphs-greek", 5),
            _GLYPHS_DOWNSTREAM,
            domains=("", ""),
        )
        for network in ("cnn", "resnet")
    ),
)
