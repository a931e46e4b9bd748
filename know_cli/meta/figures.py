"""How well held-out targets are predicted, beside what simple rules reach.

The L1 ratio of a prediction is mean|θ̂ − θ_target| / mean|θ0 − θ_target|: 1 is "predict no
change", 0 is perfect.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from know_cli.meta.series import Floats
from know_cli.meta.windows import Windows


@dataclass(frozen=True)
class Figures:
    """L1 ratios on held-out windows, of KNOWN and of its simple rivals.

    Attributes:
        rows: number of held-out windows.
        known: of KNOWN.
        known_l2: root of its mean squared error over that of no change.
        better: share of the held-out trajectories in which its own L1 ratio is below 1.
        multiplier: of λ·θ0 with the best λ.
        multiplier_value: that λ.
        extrapolation: of θ0 + α·(θ0 − θ1) with the best α.
        extrapolation_value: that α.
        average: of the mean of the window.
        least_squares: of the linear map of the window that has the least squared error on the
            training windows, a rule of S numbers.

    The best λ and α are found on the held-out windows themselves, which favours these rivals.
    """

    rows: int
    known: float
    known_l2: float
    better: float
    multiplier: float
    multiplier_value: float
    extrapolation: float
    extrapolation_value: float
    average: float
    least_squares: float


def measure(prediction: Floats, held_out: Windows, training: Windows) -> Figures:
    """Compare predictions for the held-out windows with simple rules.

    Args:
        prediction: ``[rows]`` float32, KNOWN's answers.
        held_out: ``rows`` windows.
        training: what KNOWN was fitted to, for the rules that are fitted.
    """
    newest, targets = held_out.windows[:, -1], held_out.targets
    step = newest - held_out.windows[:, -2]
    multiplier = best_factor(newest, targets)
    extrapolation = best_factor(step, targets - newest)
    weights = least_squares(training)
    return Figures(
        rows=len(held_out),
        known=l1_ratio(prediction, held_out),
        known_l2=l2_ratio(prediction, held_out),
        better=_share_better(prediction, held_out),
        multiplier=l1_ratio(np.float32(multiplier) * newest, held_out),
        multiplier_value=multiplier,
        extrapolation=l1_ratio(newest + np.float32(extrapolation) * step, held_out),
        extrapolation_value=extrapolation,
        average=l1_ratio(held_out.windows.mean(axis=1), held_out),
        least_squares=l1_ratio(held_out.windows @ weights, held_out),
    )


def l1_ratio(prediction: Floats, windows: Windows) -> float:
    """mean|θ̂ − θ_target| / mean|θ0 − θ_target|; NaN where no target differs from θ0."""
    nothing = np.abs(windows.windows[:, -1] - windows.targets).mean(dtype=np.float64)
    error = np.abs(prediction - windows.targets).mean(dtype=np.float64)
    return float(error / nothing) if nothing else float("nan")


def l2_ratio(prediction: Floats, windows: Windows) -> float:
    """Root mean square of θ̂ − θ_target over that of θ0 − θ_target; NaN where that is 0."""
    nothing = np.square(windows.windows[:, -1] - windows.targets).mean(dtype=np.float64)
    error = np.square(prediction - windows.targets).mean(dtype=np.float64)
    return float(np.sqrt(error / nothing)) if nothing else float("nan")


def best_factor(values: NDArray[np.floating], targets: NDArray[np.floating]) -> float:
    """The factor f with the least Σ|f·values − targets|; 1 where all values are 0.

    It is the median of targets / values weighted by |values|.
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
    """``[S]`` float32 weights of the linear map of a window with the least squared error."""
    # Histories are nearly constant: solving for differences to θ0 keeps the digits that count.
    newest = windows.windows[:, -1:].astype(np.float64)
    inputs = np.concatenate([windows.windows[:, :-1] - newest, newest], axis=1)
    solution = np.linalg.lstsq(inputs, windows.targets - newest[:, 0], rcond=None)[0]
    weights = solution.copy()
    weights[-1] += 1 - solution[:-1].sum()
    answer: Floats = weights.astype(np.float32)
    return answer


def _share_better(prediction: Floats, windows: Windows) -> float:
    error = np.abs(prediction - windows.targets).astype(np.float64)
    nothing = np.abs(windows.windows[:, -1] - windows.targets).astype(np.float64)
    numbers, rows = np.unique(windows.trajectory, return_inverse=True)
    gained = np.bincount(rows, nothing - error, minlength=len(numbers))
    return float((gained > 0).mean())
