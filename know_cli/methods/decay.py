"""Averages along a run that stand for a decay of its learning rate: their coefficients.

Training at a constant rate moves the weights from θ(t0) by some movement in each step. Had the
rate been multiplied by d(t), which falls from 1 at the beginning of a decay to 0 at its end, each
movement would have been so much shorter, as far as gradients would have stayed the same:

    θ(t0) + Σ_t d(t)·(θ(t) − θ(t − 1)).

That is an average of the weights along the run ("WSM: Decay-Free Learning Rate Schedule via
Checkpoint Merging for LLM Pre-training", Tian et al., arXiv 2507.17634; "Training trajectories,
mini-batch losses and the curious role of the learning rate", Sandler et al., arXiv 2301.02312).

Of the run only some checkpoints θ_0 … θ_(N−1) are left, oldest first, saved after t_0 < … < t_(N−1)
steps. Between two of them the movement is taken to be even, so that it is shortened by the mean
d̄_j of d over (t_(j−1), t_j], and the sum by parts is

    θ_0 + Σ_j d̄_j·(θ_j − θ_(j−1)) = Σ_j c_j·θ_j,   c_j = d̄_j − d̄_(j+1),   d̄_0 = 1,  d̄_N = 0.

Since d falls, no coefficient is below 0, and they add up to 1. Before the beginning of the decay
d is 1: of a movement that the beginning divides, the first part counts whole, which is the start
interpolated between its neighbours. If the beginning is before t_0, θ_0 stands for the start.

The moving average with a half-life fits in: weights 2^(−(T − t)/h) along the run, normalised over
what was saved, are those of the decay d(t) = (1 − 2^(−(T − t)/h)) / (1 − 2^(−(T − t_0)/h)).

An exponential average is no decay: it weighs the checkpoints, not the steps between them, so that
the latest one counts most. What it forgets by is fixed; it was measured so.

Free of torch, so that options are checked before it is imported. Differences are written so that
nothing cancels, however near to each other checkpoints are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import pairwise

from know_cli.errors import UsageError

#: The plain mean, the decays, the exponential average and the moving average.
SHAPES = ("uniform", "linear", "sqrt", "cosine", "exponential", "ema")
#: Those that weigh the checkpoints by their order alone.
ORDERED = ("uniform", "exponential")


class LoraMode(str, Enum):
    """How pairs of LoRA's factors are averaged: as their products, or each factor for itself."""

    EXACT = "exact"
    FACTORS = "factors"


#: The mean of d over a stretch ``[a, b]`` of the decay, which goes from 0 to 1.
Mean = Callable[[float, float], float]

# From here on down a series is more precise than a difference.
_SMALL = 1e-2
# Far more than any run has; from here on nothing of the older checkpoints is left in a float.
_MOST_HALF_LIVES = 1e100


def check_average(options: Mapping[str, float | str]) -> None:
    """Refuse options of ``--method average`` that do not go together.

    Raises:
        UsageError: which ones, and what to do.
    """
    moving = options["shape"] == "ema"
    if moving and "half-life" not in options:
        raise UsageError(
            "--option shape=ema: give the half-life, too, in training steps, such as "
            "--option half-life=1000"
        )
    if "half-life" in options and not moving:
        raise UsageError(
            f"--option half-life={options['half-life']:g}: is for --option shape=ema, not for "
            f"shape={options['shape']}"
        )
    if "forgotten" in options:
        _check_forgotten(options)
    if moving and "over" in options:
        raise UsageError(
            f"--option over={options['over']:g}: a moving average has no beginning; leave it out, "
            "or take another shape than ema"
        )


def _check_forgotten(options: Mapping[str, float | str]) -> None:
    """Refuse what else is asked of the mean of the most-forgotten checkpoints."""
    others = [name for name in ("last", "over") if name in options]
    others += ["shape"] if options["shape"] != SHAPES[0] else []
    for name in others:
        raise UsageError(
            f"--option forgotten={options['forgotten']}: is a plain mean of so many checkpoints, "
            f"and --option {name}={options[name]} asks for another average; leave one of them out"
        )


def exponential_coefficients(count: int) -> list[float]:
    """Coefficients of an exponential average that forgets half in half of the window.

    Args:
        count: N, the number of checkpoints.

    Returns:
        ``[N]``, the oldest first: each is 2^(2/(N − 1)) times the one before; their sum is 1.

    >>> [round(one, 3) for one in exponential_coefficients(3)]
    [0.143, 0.286, 0.571]
    """
    weights = [0.5 ** (2 * back / max(count - 1, 1)) for back in range(count - 1, -1, -1)]
    return [weight / sum(weights) for weight in weights]


def decay_coefficients(times: Sequence[float], begin: float, mean: Mean) -> list[float]:
    """Coefficients of the checkpoints of a run whose rate would have decayed to its end.

    Args:
        times: ``[N]``, after how many steps each was saved; rising.
        begin: of the decay; at the last of them or after it nothing decays.
        mean: of the decay's shape.

    Returns:
        ``[N]``, none below 0, with the sum 1.

    >>> decay_coefficients([1, 2, 3], 1, SHAPE_MEANS["linear"])
    [0.25, 0.5, 0.25]
    >>> decay_coefficients([0, 10, 20], 15, SHAPE_MEANS["linear"])
    [0.0, 0.25, 0.75]
    """
    span = times[-1] - begin
    if span <= 0:
        return [0.0] * (len(times) - 1) + [1.0]
    multipliers = [1.0]
    for before, after in pairwise(times):
        # Where d is 1 in a part of the stretch, the rest counts for its share.
        a, b = max((before - begin) / span, 0.0), (after - begin) / span
        share = (after - max(before, begin)) / (after - before)
        multipliers.append(1 - share * (1 - mean(a, b)) if b > 0 else 1.0)
    multipliers.append(0.0)
    return [max(one - other, 0.0) for one, other in pairwise(multipliers)]


def _linear(a: float, b: float) -> float:
    """Of d = 1 − x."""
    return 1 - (a + b) / 2


def _sqrt(a: float, b: float) -> float:
    """Of d = 1 − √x, as Hägele et al. decay (arXiv 2405.18392)."""
    low, high = math.sqrt(a), math.sqrt(b)
    return 1 - 2 / 3 * (a + low * high + b) / (low + high)


def _cosine(a: float, b: float) -> float:
    """Of d = (1 + cos πx) / 2."""
    half = math.pi * (b - a) / 2
    return (1 + math.cos(math.pi * (a + b) / 2) * math.sin(half) / half) / 2


#: The mean over a stretch of each shape of a decay.
SHAPE_MEANS: Mapping[str, Mean] = {"linear": _linear, "sqrt": _sqrt, "cosine": _cosine}


def moving_mean(half_lives: float) -> Mean:
    """The mean over a stretch of the decay that a moving average stands for.

    Args:
        half_lives: in the whole of the decay.

    >>> round(moving_mean(1)(0, 1), 6)  # of 2 − 2^x
    0.557305
    """
    rate = min(half_lives, _MOST_HALF_LIVES) * math.log(2)

    def mean(a: float, b: float) -> float:
        # d = (1 − e^(−rate·(1 − x))) / (1 − e^(−rate)); e^(−rate·(1 − x)) has the mean
        # e^(−u)·(1 − e^(−w)) / w with u = rate·(1 − b) and w = rate·(b − a).
        u, w = rate * (1 - b), rate * (b - a)
        if w < _SMALL:
            lost = w / 2 - w**2 / 6 + w**3 / 24 - w**4 / 120 + w**5 / 720
        else:
            lost = 1 + math.expm1(-w) / w
        return (math.exp(-u) * lost - math.expm1(-u)) / -math.expm1(-rate)

    return mean
