"""The form of every data set, whatever it is read from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["image", "text"]
_LEVELS = 256
_REDUCED_ROWS = 5000


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs with their classes.

    Attributes:
        inputs: images ``[n, C, H, W]`` uint8, or texts ``[n, length]`` int64 tokens.
        labels: ``[n]`` int64, from 0.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification task. Its tensors may be shared with other callers: do not modify them.

    Attributes:
        name: as in ``DATA_SETS``.
        kind: ``image`` or ``text``.
        train: samples that sessions train on.
        test: samples that are only used to measure accuracy.
        classes: number of classes; labels are 0 to classes - 1.
        vocabulary: number of tokens of a text, which are 0 to vocabulary - 1; None for images.
    """

    name: str
    kind: Kind
    train: Samples
    test: Samples
    classes: int
    vocabulary: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` of an image; ``(vocabulary, length)`` of a text."""
        single = tuple(self.train.inputs.shape[1:])
        return single if self.vocabulary is None else (self.vocabulary, *single)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the training images, 0 to 1; empty for texts."""
        return tuple(mean for mean, _ in self._moments)

    @property
    def deviation(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the training images, in the units of ``mean``.

        1 for a constant channel, so that it can be divided by. Empty for texts.
        """
        return tuple(deviation for _, deviation in self._moments)

    @cached_property
    def _moments(self) -> list[tuple[float, float]]:
        if self.kind != "image":
            return []
        found = []
        values = torch.arange(_LEVELS, dtype=torch.float64) / (_LEVELS - 1)
        for channel in self.train.inputs.unbind(1):
            # A histogram is exact and needs no copy of all images as floats.
            counts = torch.bincount(channel.flatten(), minlength=_LEVELS)
            share = counts.double() / channel.numel()
            mean = float(share @ values)
            variance = float(share @ (values - mean) ** 2)
            found.append((mean, math.sqrt(variance) if variance > 0 else 1.0))
        return found


def standardise(inputs: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Standardise images for networks: mean 0 and standard deviation 1 in each channel.

    Args:
        inputs: ``[n, C, H, W]`` uint8.
        mean: of each channel, 0 to 1, such as :attr:`DataSet.mean`.
        deviation: of each channel, in the same units, such as :attr:`DataSet.deviation`.

    Returns:
        ``[n, C, H, W]`` float32, a new tensor.

    Example:
        >>> standardise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.25]).item()
        2.0
    """
    centre, width = (
        torch.tensor(list(values), dtype=torch.float32, device=inputs.device).view(-1, 1, 1)
        for values in (mean, deviation)
    )
    return (inputs.float() / (_LEVELS - 1) - centre) / width


def reduced(data: DataSet, side: int | None) -> DataSet:
    """A data set with its images reduced to a square, by averaging over areas.

    Args:
        data: the data set; texts, and images that are not larger, are returned as they are.
        side: in pixels; None leaves everything as it is.
    """
    if side is None or data.kind != "image" or max(data.shape[1:]) <= side:
        return data

    def of(samples: Samples) -> Samples:
        parts = [
            functional.interpolate(part.float(), (side, side), mode="area").round().byte()
            for part in torch.split(samples.inputs, _REDUCED_ROWS)
        ]
        return Samples(torch.cat(parts), samples.labels)

    return replace(data, train=of(data.train), test=of(data.test))
