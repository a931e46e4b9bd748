"""A user's measure of weights over the plane of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from know_cli.checkpoints import Checkpoint
from know_cli.checkpoints.dtypes import torch_dtype
from know_cli.checkpoints.reading import chunks, read_elements, read_tensor
from know_cli.errors import UsageError, a_type
from know_cli.forgetting.runner import load_object, user_code
from know_cli.plots.plane import Plane

Values = NDArray[np.float64]

# The least ratio of the shorter side to the longer: a nearly straight trajectory would give a
# strip too narrow for contours.
_NARROWEST = 0.6


@dataclass(frozen=True)
class Grid:
    """Evenly spaced points of the plane.

    Attributes:
        x, y: float64 ``[n]``, ascending coordinates along the first and the second axis.
    """

    x: Values
    y: Values


@dataclass(frozen=True)
class Evaluation:
    """A user's function of weights.

    Attributes:
        name: as the user wrote it.
        function: state dict → a finite number.
    """

    name: str
    function: Callable[[dict[str, Tensor]], Any]

    def __call__(self, state: dict[str, Tensor]) -> float:
        """The value of the function for a state dict.

        Raises:
            UsageError: the function fails or does not return a finite number.
        """
        with user_code(self.name, "evaluation"):
            result = self.function(state)
        try:
            value = float(result)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"{self.name}: returned {a_type(result)}, not a number") from None
        if not math.isfinite(value):
            raise UsageError(f"{self.name}: returned {value}, not a finite number")
        return value


def load_evaluation(name: str) -> Evaluation:
    """Import a user's function by ``module:function`` or ``file.py:function``.

    Raises:
        UsageError: there is no such function, importing it fails, or it is not callable.
    """
    function = load_object(name)
    if not callable(function):
        raise UsageError(f"{name}: is {a_type(function)}, not a function")
    return Evaluation(name, function)


def grid_around(plane: Plane, size: int, margin: float) -> Grid:
    """A grid that covers all checkpoints.

    Args:
        plane: of the checkpoints.
        size: points along each axis.
        margin: around the checkpoints, as a share of the longer side of their box.

    Raises:
        UsageError: the checkpoints lie on one line.
    """
    plane.require_plane()
    points = plane.coordinates[:, :2]
    low, high = points.min(0), points.max(0)
    longest = float((high - low).max())
    half = np.maximum((high - low) / 2, _NARROWEST * longest / 2) + margin * longest
    centre = (low + high) / 2
    x, y = (np.linspace(centre[a] - half[a], centre[a] + half[a], size) for a in range(2))
    return Grid(x, y)


def combine(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], coefficients: Values
) -> dict[str, Tensor]:
    """A linear combination of checkpoints as a state dict, computed block by block.

    It is computed in float64 as Θ0 + Σi ci (Θi − Θ0) and rounded to each tensor's dtype in Θ0.

    Args:
        checkpoints: N of them with the same names and shapes; Θ0 first.
        names: of the float tensors to combine; all others are Θ0's.
        coefficients: float64 ``[N]``, which sum to 1.

    Returns:
        New tensors on the CPU, in the order of Θ0's files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    chosen, state = set(names), {}
    for name, entry in checkpoints[0].tensors.items():
        if name in chosen:
            state[name] = _combine_tensor(checkpoints, name, coefficients)
        else:
            state[name] = read_tensor(checkpoints[0], entry)
    return state


def _combine_tensor(checkpoints: Sequence[Checkpoint], name: str, coefficients: Values) -> Tensor:
    first, entry = checkpoints[0], checkpoints[0].tensors[name]
    out = torch.empty(entry.info.elements, dtype=torch_dtype(entry.dtype))
    for start, count in chunks(0, entry.info.elements):
        origin = read_elements(first, entry, start, count).double()
        moved = origin.clone()
        for checkpoint, coefficient in zip(checkpoints[1:], coefficients[1:], strict=True):
            other = read_elements(checkpoint, checkpoint.tensors[name], start, count).double()
            moved += float(coefficient) * (other - origin)
        out[start : start + count] = moved
    return out.reshape(entry.shape)


def evaluate_grid(
    grid: Grid,
    state_at: Callable[[float, float], dict[str, Tensor]],
    evaluation: Evaluation,
    advance: Callable[[int], None],
) -> Values:
    """Evaluate the weights at every point of a grid.

    Args:
        grid: the points.
        state_at: (x, y) → the weights there, as a state dict.
        evaluation: measures them.
        advance: called with the number of points finished since the last call.

    Returns:
        float64 ``[len(grid.y), len(grid.x)]``.

    Raises:
        UsageError: the function fails or does not return a finite number.
    """
    values = np.empty((len(grid.y), len(grid.x)))
    for row, y in enumerate(grid.y.tolist()):
        for column, x in enumerate(grid.x.tolist()):
            values[row, column] = evaluation(state_at(x, y))
            advance(1)
    return values


def describe(grid: Grid, values: Values, function: str, label: str) -> dict[str, Any]:
    """A landscape in plain types for a JSON file.

    Returns:
        ``function``, ``label``; ``grid`` with ``x``, ``y`` and ``values``, a list with one row
        per value of y.
    """
    return {
        "function": function,
        "label": label,
        "grid": {"x": grid.x.tolist(), "y": grid.y.tolist(), "values": values.tolist()},
    }
