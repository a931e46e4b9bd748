"""Fixed linear combinations of the window, which is all that many methods are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from know_cli.engine.plan import Block
from know_cli.engine.predictor import Predictors
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.passes.native import native
from know_cli.passes.numbers import weighted_sum

#: Weights of a window's values, most-forgotten first, θ0 last, for each step: ``[steps][S]``.
Weights = Sequence[Sequence[float]]

_BLOCK_ROWS = 1 << 14
_ROWS_AT_ONCE = 1 << 17
_HALVES = ("F16", "BF16")


class LinearPredictor:
    """Predicts θ̂(−step) = Σ weights[kind][step − 1][k] · window[k].

    The sum is taken in float64 and rounded once, so weights that sum to 1 keep a constant history,
    and a single weight of 1 passes its checkpoint on unchanged, bit for bit. Histories may be
    float64, too, and then nothing is rounded to float32.

    Args:
        weights: the weights of each step, for each of conv, fc and bias.
        rounds_once: round values of 16-bit tensors so to float32 that they come out as if the
            sum had been rounded to their dtype at once.
    """

    device = torch.device("cpu")
    block_rows = _BLOCK_ROWS
    #: The sum and one product in float64, or what is cut off of it.
    thread_bytes = 2 * 8 * _BLOCK_ROWS

    def __init__(self, weights: Mapping[Kind, Weights], *, rounds_once: bool = False) -> None:
        self._weights = weights
        self._rounds_once = rounds_once

    def predict(self, block: Block, step: int, history: Tensor, out: Tensor) -> None:
        """Predict one step; see :class:`~know_cli.engine.predictor.Predictor`."""
        weights = self._weights[block.kind][step - 1]
        taken = [k for k, weight in enumerate(weights) if weight]
        if [weights[k] for k in taken] == [1.0]:
            out.copy_(history[taken[0]])  # a sum has lost the sign of -0
            return
        runs = [(slice(None), False)]
        if self._rounds_once:
            runs = [(rows, dtype in _HALVES) for dtype, rows in block.dtypes()]
        for rows, to_odd in runs:
            weighted_sum(weights, history[: len(weights), rows], out[rows], to_odd=to_odd)


def rows_at_once() -> int | None:
    """For its :class:`Predictors`: a compiled pass needs no room for sums."""
    return _ROWS_AT_ONCE if native() is not None else None


def combine_by_kind(weights: Mapping[Kind, Weights]) -> Predictors:
    """Return the method with these weights for each kind, which computes float64 in float64."""
    predictor = LinearPredictor(weights)
    return Predictors(predictor, exact=predictor, rows_at_once=rows_at_once())


def combine(weights: Weights) -> Predictors:
    """Return the method whose weights are the same for all kinds.

    Args:
        weights: ``[steps][S]``, of a window's values, most-forgotten first, θ0 last.

    >>> mean = combine([[0.5, 0.5]])
    >>> mean.devices
    (device(type='cpu'),)
    """
    return combine_by_kind(dict.fromkeys(PREDICTED_KINDS, weights))


def only(position: int, checkpoints: int, steps: int, factor: float = 1.0) -> list[list[float]]:
    """Return weights ``[steps][S]`` that take one value of the window, times a factor.

    >>> only(-1, 3, 1)
    [[0.0, 0.0, 1.0]]
    """
    weights = [0.0] * checkpoints
    weights[position] = factor
    return [list(weights) for _ in range(steps)]


def line(positions: Sequence[float], targets: Sequence[float]) -> list[list[float]]:
    """Return weights that evaluate the least-squares line through a window at other positions.

    With x̄ the mean position, the line's value at t is Σ w_k θ_k with
    w_k = 1/S + (t − x̄)(x_k − x̄) / Σ (x_j − x̄)².

    Args:
        positions: ``[S]``, of the window's values; not all the same.
        targets: ``[steps]``, where the line is evaluated.

    Returns:
        ``[steps][S]``, in the order of the positions.

    >>> line([0.0, 1.0], [2.0])  # as far beyond the second value as that is from the first
    [[-1.0, 2.0]]
    """
    count = len(positions)
    mean = sum(positions) / count
    centred = [position - mean for position in positions]
    spread = sum(distance**2 for distance in centred)
    return [
        [1 / count + (target - mean) * distance / spread for distance in centred]
        for target in targets
    ]
