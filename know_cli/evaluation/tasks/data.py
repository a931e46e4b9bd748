"""The samples that evaluation may use, none of which KNOWN's meta-training ever sees."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from know_cli.evaluation.tasks.examples import Examples
from know_cli.lab.data import DataSet, Samples, load, render_glyphs, standardise
from know_cli.lab.data.parts import meta_part
from know_cli.lab.digits import load_pixels

#: Seeds of the glyphs for training and testing, which meta-training does not use.
_GLYPH_SEEDS = (4032, 4033)
_GLYPHS = (6000, 4000)
# The digits' pixels are integers from 0 to 16.
_DIGIT_LEVELS = 16


def evaluation_part(data: DataSet) -> Samples:
    """The training samples of a data set from files that meta-training may not use.

    Returns:
        The second half, which :func:`~know_cli.lab.data.parts.meta_part` leaves.
    """
    used = len(meta_part(data))
    return Samples(data.train.inputs[used:], data.train.labels[used:])


@cache
def load_images(
    name: str, data_folder: Path | None, *, whole: bool = False
) -> tuple[Examples, Examples, int]:
    """Standardised images of a data set for evaluation.

    Args:
        name: of the data set. Of ``digits`` it is the half that meta-training does not use;
            glyphs are newly drawn; for others see :func:`evaluation_part`.
        data_folder: where the data sets' files are.
        whole: all of a data set from files, also what meta-training may use: for hyper-models that
            were taught on other data sets, as the shipped ones were.

    Returns:
        Training and test examples with inputs ``[n, C, H, W]`` float32, and the number of
        classes. The digits are few, so all are training examples and there are no test ones.

    Raises:
        UsageError: the data set is missing or corrupt.
    """
    if name == "digits":
        pixels, labels = load_pixels("demo")
        shares = pixels.float() / _DIGIT_LEVELS
        images = (shares - shares.mean()) / shares.std()
        return Examples(images, labels), Examples(images[:0], labels[:0]), int(labels.max()) + 1
    if name.startswith("glyphs-"):
        alphabet = name.removeprefix("glyphs-")
        train, test = (
            render_glyphs(alphabet, count, seed)
            for count, seed in zip(_GLYPHS, _GLYPH_SEEDS, strict=True)
        )
        data = DataSet(name, "image", train, test, int(train.labels.max()) + 1)
    else:
        data = load(name, data_folder)
        train, test = data.train if whole else evaluation_part(data), data.test
    first, second = (
        Examples(standardise(samples.inputs, data.mean, data.deviation), samples.labels)
        for samples in (train, test)
    )
    return first, second, data.classes


def of_classes(examples: Examples, classes: torch.Tensor) -> Examples:
    """The examples of some classes, with labels renumbered from 0.

    Args:
        examples: with labels ``[n]``.
        classes: int64 ``[k]``; its first becomes class 0.
    """
    numbers = torch.full((int(examples.targets.max()) + 1,), -1)
    numbers[classes] = torch.arange(len(classes))
    labels = numbers[examples.targets]
    return Examples(examples.inputs[labels >= 0], labels[labels >= 0])


def resized(examples: Examples, shape: tuple[int, ...]) -> Examples:
    """Convert images to another shape ``(C, H, W)``, repeating a single channel if needed."""
    channels, height, width = shape
    images = examples.inputs
    if tuple(images.shape[2:]) != (height, width):
        images = nn.functional.interpolate(images, (height, width), mode="bilinear")
    if images.shape[1] != channels:
        images = images.expand(-1, channels, -1, -1).contiguous()
    return Examples(images, examples.targets)
