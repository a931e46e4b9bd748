"""How well held-out targets are predicted, compared with simple rules.

The L1 ratio of a prediction is mean|θ̂ − θ_target| / mean|θ0 − θ_target|: 1 is "predict no
change", 0 is perfect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from know_cli.known.module import Known, roll
from know_cli.meta.series import Floats
from know_cli.meta.windows import Windows

#: Rows per forward pass without gradients.
_CHUNK = 1 << 16
#: Rules with a best factor are fitted to at most this many rows.
_MOST_ROWS = 2_000_000


@dataclass(frozen=True)
class Scores:
    """L1 ratios on held-out windows after some steps, of KNOWN and of simple baselines.

    Attributes:
        rows: number of held-out windows.
        trajectories: number of trajectories that these are from.
        known: KNOWN's L1 ratio.
        known_l2: root of KNOWN's mean squared error over that of no change.
        median: of KNOWN's L1 ratios in each trajectory.
        better: share of the trajectories in which that ratio is below 1.
        multiplier: L1 ratio of λ·θ0 with the best λ.
        multiplier_value: that λ.
        extrapolation: L1 ratio of θ0 + α·(θ0 − θ1) with the best α.
        extrapolation_value: that α.
        average: L1 ratio of the mean of the window.
        least_squares: L1 ratio of the linear map of the window, S weights, that has the least
            squared error on the training windows.
        others: L1 ratios of further KNOWN, by name.

    The best λ and α are found on the held-out windows themselves, which favours these baselines.
    """

    rows: int
    trajectories: int
    known: float
    known_l2: float
    median: float
    better: float
    multiplier: float
    multiplier_value: float
    extrapolation: float
    extrapolation_value: float
    average: float
    least_squares: float
    others: dict[str, float] = field(default_factory=dict)


def measure(
    prediction: Floats,
    held_out: Windows,
    rule: Floats,
    others: Mapping[str, Floats] | None = None,
) -> Scores:
    """Compare predictions for the held-out windows with simple rules.

    Args:
        prediction: ``[rows]`` float32, by KNOWN.
        held_out: ``rows`` windows with a single target, after the same number of steps.
        rule: ``[S]`` float32, see :func:`least_squares`.
        others: predictions ``[rows]`` float32 of further KNOWN, by name.
    """
    newest, targets = held_out.windows[:, -1], held_out.targets[:, 0]
    step = newest - held_out.windows[:, -2]
    some = slice(None, None, -(-len(held_out) // _MOST_ROWS) or 1)
    multiplier = best_factor(newest[some], targets[some])
    extrapolation = best_factor(step[some], (targets - newest)[some])
    ratios = _ratios(prediction, held_out)
    return Scores(
        rows=len(held_out),
        trajectories=len(ratios),
        known=l1_ratio(prediction, held_out),
        known_l2=l2_ratio(prediction, held_out),
        median=float(np.median(ratios)) if len(ratios) else float("nan"),
        better=float((ratios < 1).mean()) if len(ratios) else float("nan"),
        multiplier=l1_ratio(np.float32(multiplier) * newest, held_out),
        multiplier_value=multiplier,
        extrapolation=l1_ratio(newest + np.float32(extrapolation) * step, held_out),
        extrapolation_value=extrapolation,
        average=l1_ratio(held_out.windows.mean(axis=1), held_out),
        least_squares=l1_ratio(held_out.windows @ rule, held_out),
        others={name: l1_ratio(answer, held_out) for name, answer in (others or {}).items()},
    )


def predict(known: Known, windows: Floats, steps: int) -> Floats:
    """Predict ``[rows, steps]`` float32 from windows ``[rows, S]`` float32."""
    with torch.inference_mode():
        parts = [
            roll(known, part, steps) for part in torch.split(torch.from_numpy(windows), _CHUNK)
        ]
    joined: Floats = torch.cat(parts).numpy()
    return joined


def l1_ratio(prediction: Floats, windows: Windows) -> float:
    """mean|θ̂ − θ_target| / mean|θ0 − θ_target|; NaN where no target differs from θ0."""
    targets = windows.targets[:, 0]
    nothing = np.abs(windows.windows[:, -1] - targets).mean(dtype=np.float64)
    error = np.abs(prediction - targets).mean(dtype=np.float64)
    return float(error / nothing) if nothing else float("nan")


def l2_ratio(prediction: Floats, windows: Windows) -> float:
    """Root mean square of θ̂ − θ_target over that of θ0 − θ_target; NaN where that is 0."""
    targets = windows.targets[:, 0]
    nothing = np.square(windows.windows[:, -1] - targets).mean(dtype=np.float64)
    error = np.square(prediction - targets).mean(dtype=np.float64)
    return float(np.sqrt(error / nothing)) if nothing else float("nan")


def best_factor(values: NDArray[np.floating], targets: NDArray[np.floating]) -> float:
    """The factor f that minimises Σ|f·values − targets|; 1 if all values are 0.

    It is the median of targets / values, weighted by |values|.
    """
    used = values != 0
    if not used.any():
        return 1.0
    weights = np.abs(values[used], dtype=np.float64)
    quotients = targets[used] / values[used].astype(np.float64)
    order = np.argsort(quotients, kind="stable")
    total = np.cumsum(weights[order])
    return float(quotients[order][np.searchsorted(total, total[-1] / 2)])


def least_squares(windows: Windows) -> Floats:
    """Fit the linear map of a window with the least squared error: ``[S]`` float32 weights.

    Args:
        windows: with a single target.
    """
    # Histories are nearly constant: solving for differences to θ0 keeps the digits that count.
    newest = windows.windows[:, -1:].astype(np.float64)
    inputs = np.concatenate([windows.windows[:, :-1] - newest, newest], axis=1)
    # The normal equations of centred inputs are well conditioned and need no copy of all rows.
    moments = inputs.T @ inputs
    solution = np.linalg.lstsq(
        moments, inputs.T @ (windows.targets[:, 0] - newest[:, 0]), rcond=None
    )[0]
    weights = solution.copy()
    weights[-1] += 1 - solution[:-1].sum()
    answer: Floats = weights.astype(np.float32)
    return answer


def _ratios(prediction: Floats, windows: Windows) -> NDArray[np.float64]:
    """The L1 ratio in each trajectory, except those in which no target differs from θ0."""
    targets = windows.targets[:, 0]
    numbers, rows = np.unique(windows.trajectory, return_inverse=True)
    error = np.bincount(rows, np.abs(prediction - targets), minlength=len(numbers))
    nothing = np.bincount(rows, np.abs(windows.windows[:, -1] - targets), minlength=len(numbers))
    found: NDArray[np.float64] = error[nothing > 0] / nothing[nothing > 0]
    return found
