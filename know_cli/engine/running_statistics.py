"""Running statistics of normalisation layers, adjusted without data to the weights before them.

Per output channel with weights w → w′ and bias b → b′ (0 where there is none), and with
q = ⟨w′, w⟩ / ⟨w, w⟩: mean′ = (mean − b)·q + b′ and var′ = var·‖w′‖² / ‖w‖².
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class ChannelSums:
    """⟨w, w⟩, ⟨w′, w⟩ and ‖w′‖² a output channel, gathered while the weights stream by.

    Attributes:
        channels: number of output channels, the first dimension of the weights.
        channel_size: weights a channel.
        grid: sums are formed between multiples of this many rows of a batch, so that they come
            out the same however many blocks a batch has.
        leading: where the weights that were taken in begin within a channel, the number of that
            channel and its sums, grid by grid ``[grids, 3]``, which :meth:`join` adds to those of
            the rank before in the order that one process would.
        is_begun: whether any weights were taken in.
    """

    channels: int
    channel_size: int
    grid: int
    sums: Array = field(init=False)
    leading: tuple[int, list[list[float]]] | None = field(init=False, default=None)
    is_begun: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((3, self.channels))

    def add(self, start: int, row: int, before: Array, after: Array) -> None:
        """Take in weights.

        Args:
            start: position of the first within its tensor.
            row: position of the first within its batch, which starts at a block's start.
            before: ``[count]`` float64, Θ0.
            after: ``[count]`` float64, the prediction.
        """
        count = len(before)
        positions = np.arange(count)
        cuts = np.flatnonzero(
            ((start + positions) % self.channel_size == 0) | ((row + positions) % self.grid == 0)
        )
        cuts = np.union1d([0], cuts)
        channel = (start + cuts) // self.channel_size
        parts = np.stack(
            [
                np.add.reduceat(product, cuts)
                for product in (before * before, after * before, after * after)
            ]
        )
        if not self.is_begun and start % self.channel_size:
            self.leading = int(channel[0]), []
        self.is_begun = True
        if self.leading is not None:
            of_leading = int(np.searchsorted(channel, self.leading[0], "right"))
            self.leading[1].extend(parts[:, :of_leading].T.tolist())
            channel, parts = channel[of_leading:], parts[:, of_leading:]
        for total, part in zip(self.sums, parts, strict=True):
            np.add.at(total, channel, part)

    def join(self, sums: Array, leading: tuple[int, list[list[float]]] | None) -> None:
        """Take in what another has gathered of the weights that follow.

        Args:
            sums: of the other.
            leading: of the other.
        """
        self.sums += sums
        if leading is not None:
            channel, parts = leading
            for part in parts:
                self.sums[:, channel] += part

    def mean_and_variance(
        self, mean: Array, variance: Array, bias_before: Array, bias_after: Array
    ) -> tuple[Array, Array]:
        """Rescaled running statistics, each ``[channels]`` float64.

        A channel without weights (all zero in Θ0) keeps its variance and the projection 1.
        """
        squared, projected, squared_after = self.sums
        alive = squared > 0
        safe = np.where(alive, squared, 1.0)
        projection = np.where(alive, projected / safe, 1.0)
        growth = np.where(alive, squared_after / safe, 1.0)
        return (mean - bias_before) * projection + bias_after, variance * growth
