"""Running statistics of normalisation layers without data: rescaled, or averaged.

Rescaled, they are adjusted to the weights before them. Per output channel with weights w → w′ and
bias b → b′ (0 where there is none), and with q = ⟨w′, w⟩ / ⟨w, w⟩: mean′ = (mean − b)·q + b′ and
var′ = var·‖w′‖² / ‖w‖².

Averaged, they are those of the checkpoints' distributions mixed with the shares c: mean′ = Σ c·mean
and var′ = Σ c·var + Σ c·(mean − mean′)². For averaged weights the mean is right as far as a layer's
inputs stay the same. The variance is no theorem, since what checkpoints do not agree on averages
out; of the formulas that were tried it came nearest to statistics estimated on data
(docs/methods.md has the numbers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from know_cli.checkpoints import Checkpoint, Trajectory
from know_cli.checkpoints.reading import read_elements
from know_cli.engine.batches import Stretch
from know_cli.engine.plan import Plan, PlannedTensor
from know_cli.normalisation import NormLayer

Array = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

# Of sums: whatever a block's rows are, it begins and ends on this grid.
_GRID_ROWS = 1 << 15


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

    def measured(self, start: int, row: int, before: Array, after: Array) -> tuple[Numbers, Array]:
        """Sum up weights, which :meth:`add` then takes in; safe in any thread.

        Args:
            start: position of the first within its tensor.
            row: position of the first within its batch, which starts at a block's start.
            before: ``[count]`` float64, Θ0.
            after: ``[count]`` float64, the prediction.

        Returns:
            Channels ``[parts]``, ascending, and the sums of each part ``[3, parts]``.
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
        return channel, parts

    def add(self, start: int, channel: Numbers, parts: Array) -> None:
        """Take in what :meth:`measured` found, in the order of the weights.

        Args:
            start: position of the first weight within its tensor.
            channel: of each part.
            parts: the sums.
        """
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


@dataclass(frozen=True)
class Measured:
    """What is to be known of a run of one tensor's weights or biases after a step.

    Attributes:
        key: the step, and the tensor's name.
        start: position of the first within its tensor.
        values: of biases the values, ``[count]``, of weights the sums, ``[3, parts]``; float64.
        channel: of weights the channel of each part; None of biases.
    """

    key: tuple[int, str]
    start: int
    values: Array
    channel: Numbers | None


class RunningStatistics:
    """What rescaling needs to know of the weights and biases that stream by, a step.

    Args:
        first: Θ0.
        layers: whose statistics are rescaled.
        grid: of sums; see :class:`ChannelSums`.
        steps: of the outputs.
    """

    def __init__(
        self, first: Checkpoint, layers: Iterable[NormLayer], grid: int, steps: Iterable[int]
    ) -> None:
        self._first = first
        self._sums: dict[tuple[int, str], ChannelSums] = {}
        self._biases: dict[tuple[int, str], Array] = {}
        for layer, step in product(layers, steps):
            if layer.source_weight is not None:
                channels, *rest = first.tensors[layer.source_weight].shape
                self._sums[step, layer.source_weight] = ChannelSums(channels, math.prod(rest), grid)
            if layer.source_bias is not None:
                self._biases[step, layer.source_bias] = self._values(layer.source_bias)

    @staticmethod
    def of(trajectory: Trajectory, plan: Plan, steps: Iterable[int]) -> RunningStatistics:
        """Of the layers that a plan rescales."""
        layers = {tensor.layer.prefix: tensor.layer for tensor in plan.rescales if tensor.layer}
        grid = math.gcd(_GRID_ROWS, plan.block_rows)
        return RunningStatistics(trajectory.first, layers.values(), grid, list(steps))

    def needs(self, step: int, stretch: Stretch) -> bool:
        """Whether a stretch has weights or biases that are to be taken in."""
        if not self._sums:
            return False
        names = ((step, segment.tensor.name) for segment in stretch.segments)
        return any(key in self._sums or key in self._biases for key in names)

    def measure(
        self, step: int, stretch: Stretch, written: Tensor, before: Tensor, after: Tensor
    ) -> list[Measured]:
        """What is to be known of a stretch after a step; safe in any thread.

        Args:
            step: of the prediction.
            stretch: which rows.
            written: ``[rows]`` float64, all that is written.
            before: ``[rows]`` float64, Θ0; as ``after`` where it was copied.
            after: ``[rows]`` float64, what is written, 0 where it is not finite.
        """
        found: list[Measured] = []
        for segment in stretch.segments:
            key, rows = (step, segment.tensor.name), segment.rows
            if key in self._biases:
                found.append(Measured(key, segment.start, written[rows].numpy().copy(), None))
            sums = self._sums.get(key)
            if sums is not None:
                row, old, new = stretch.rows.start + segment.row, before[rows], after[rows]
                channel, parts = sums.measured(segment.start, row, old.numpy(), new.numpy())
                found.append(Measured(key, segment.start, parts, channel))
        return found

    def take(self, measured: Iterable[Measured]) -> None:
        """Take in what :meth:`measure` found, stretch after stretch."""
        for one in measured:
            if one.channel is None:
                bias = self._biases[one.key]
                bias[one.start : one.start + len(one.values)] = one.values
            else:
                self._sums[one.key].add(one.start, one.channel, one.values)

    def to_json(self) -> dict[str, Any]:
        """What this rank has taken in, for :meth:`join`."""
        changes: list[tuple[int, str, list[int], list[float]]] = []
        for (step, name), values in self._biases.items():
            # Compared as bits: this rank's part is what is no longer Θ0's.
            at = np.flatnonzero(values.view(np.int64) != self._values(name).view(np.int64))
            if len(at):
                changes.append((step, name, at.tolist(), values[at].tolist()))
        return {
            "sums": [
                (step, name, sums.sums.tolist(), sums.leading)
                for (step, name), sums in self._sums.items()
                if sums.is_begun
            ],
            "biases": changes,
        }

    def join(self, part: Mapping[str, Any]) -> None:
        """Take in the part of the next rank; the order of ranks is that of the weights."""
        for step, name, sums, leading in part["sums"]:
            self._sums[step, name].join(np.array(sums), leading)
        for step, name, at, values in part["biases"]:
            self._biases[step, name][at] = values

    def rescaled(self, step: int, tensor: PlannedTensor) -> Tensor:
        """Compute a running mean or variance after a step, ``[channels]`` float64."""
        layer = tensor.layer
        assert layer is not None
        assert layer.source_weight is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = self._values(layer.running_mean), self._values(layer.running_var)
        bias = np.zeros_like(mean)
        if layer.source_bias is not None:
            bias = self._values(layer.source_bias)
        bias_after = self._biases.get((step, layer.source_bias or ""), bias)
        sums = self._sums[step, layer.source_weight]
        after = sums.mean_and_variance(mean, variance, bias, bias_after)
        return torch.from_numpy(after[tensor.name == layer.running_var])

    def _values(self, name: str) -> Array:
        """A whole small tensor of Θ0, float64."""
        return _whole(self._first, name).numpy()


def averaged(
    trajectory: Trajectory, coefficients: Sequence[float], tensor: PlannedTensor
) -> Tensor:
    """A running mean or variance of the checkpoints' distributions, mixed.

    Args:
        trajectory: the inputs.
        coefficients: ``[S]``, the share of each, Θ0's first; the sum is 1.
        tensor: one of its layer's two.

    Returns:
        ``[channels]`` float64.

    Raises:
        CheckpointError: a file cannot be read.
    """
    layer = tensor.layer
    assert layer is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    absent = {
        k
        for name in (layer.running_mean, layer.running_var)
        for k in trajectory.absent.get(name, ())
    }
    parts = [
        (share, trajectory.checkpoints[k])
        for k, share in enumerate(coefficients)
        if share and k not in absent
    ]
    if absent:  # the branches that have the layer share what the others leave
        left = sum(share for share, _ in parts)
        parts = [(share / left, one) for share, one in parts] or [(1.0, trajectory.first)]
    if len(parts) == 1:  # as it is: a sum has lost the sign of -0
        return _whole(parts[0][1], tensor.name)
    means = [_whole(checkpoint, layer.running_mean) for _, checkpoint in parts]
    total = torch.zeros(tensor.elements, dtype=torch.float64)
    for (share, _), mean in zip(parts, means, strict=True):
        total += share * mean
    if tensor.name == layer.running_mean:
        return total
    variance = torch.zeros_like(total)
    for (share, checkpoint), mean in zip(parts, means, strict=True):
        of_one = _whole(checkpoint, layer.running_var)
        variance += share * (of_one + (mean - total).square())
    return variance


def _whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A whole small tensor, float64."""
    entry = checkpoint.tensors[name]
    return read_elements(checkpoint, entry, 0, entry.info.elements).double()
