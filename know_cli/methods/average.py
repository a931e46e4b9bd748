"""Averages of checkpoints, of any length, and those that stand for a decay of the learning rate.

"Model soups" (Wortsman et al., ICML 2022, arXiv 2203.05482) average fine-tuned models,
"Averaging Weights Leads to Wider Optima" (Izmailov et al., UAI 2018, arXiv 1803.05407) those
along one training run. Here Θ0 is the latest checkpoint of a run, and the others come before it;
:mod:`know_cli.methods.decay` derives the coefficients of each shape. An average does not point to
any larger data set, so every step has the same.

Sums are formed in float64 and rounded once. Running statistics of normalisation layers are
averaged as distributions (:mod:`know_cli.engine.running_statistics`), and LoRA's pairs of factors
as their products (:mod:`know_cli.methods.lora`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.engine.predictor import Predictors
from know_cli.errors import UsageError
from know_cli.kinds import PREDICTED_KINDS
from know_cli.methods.branches import BranchesPredictor, mean_of_branches
from know_cli.methods.combination import LinearPredictor, rows_at_once
from know_cli.methods.decay import (
    ORDERED,
    SHAPE_MEANS,
    decay_coefficients,
    exponential_coefficients,
    moving_mean,
)
from know_cli.methods.inputs import Inputs
from know_cli.methods.lora import ProductPredictor, find_pairs


@dataclass(frozen=True)
class Average:
    """What is averaged.

    Attributes:
        coefficients: ``[S]``, Θ0's first; none below 0, with the sum 1.
        remarks: what the user should know of them.
    """

    coefficients: tuple[float, ...]
    remarks: tuple[str, ...] = ()


def average_of(inputs: Inputs) -> Average:
    """The coefficients that the method's options ask for.

    Raises:
        UsageError: more checkpoints are asked for than there are, or steps are needed and unknown.
    """
    if inputs.given("forgotten") is not None:
        return _of_forgotten(inputs)
    if inputs.trajectory.kind is TrajectoryKind.BRANCHES:
        return _of_branches(inputs)
    size, last, over = inputs.checkpoints, inputs.given("last"), inputs.given("over")
    if last is not None and last > size:
        raise UsageError(
            f"--option last={last:g}: only {size} checkpoints were given; give more, or leave it "
            "out"
        )
    count = size if last is None else int(last)
    steps = _steps(inputs)
    if over is not None and steps is None:
        raise UsageError(
            f"--option over={over:g}: the checkpoints do not tell after how many training steps "
            "each was saved, falling from the first to the last; give the latest first, with names "
            "such as checkpoint-500, or use --option last=N"
        )
    times = [float(step) for step in reversed(steps or range(size - 1, -1, -1))][-count:]
    average = _of_times(inputs, times, counts_steps=steps is not None)
    unused = (0.0,) * (size - count)
    return Average((*reversed(average.coefficients), *unused), average.remarks)


def _of_forgotten(inputs: Inputs) -> Average:
    """The mean of the most-forgotten checkpoints of a forgetting, which are the last given."""
    count, size, kind = inputs.given("forgotten"), inputs.checkpoints, inputs.trajectory.kind
    assert count is not None
    if kind is not TrajectoryKind.FORGETTING:
        raise UsageError(
            f"--option forgotten={count:g}: is for a forgetting, and these checkpoints are of "
            f"{kind.text}; leave it out"
        )
    if count > size:
        raise UsageError(
            f"--option forgotten={count:g}: only {size} checkpoints were given; give more, or "
            "leave it out"
        )
    kept = size - int(count)
    return Average((*(0.0,) * kept, *(1 / count,) * int(count)))


def _of_branches(inputs: Inputs) -> Average:
    """The mean of branches, which have no order."""
    for name in ("last", "over", "half-life"):
        if inputs.given(name) is not None:
            raise UsageError(
                f"--option {name}: is for checkpoints of one run, and branches have no order; "
                "leave it out"
            )
    if inputs.options["shape"] != "uniform":
        raise UsageError(
            f"--option shape={inputs.options['shape']}: is for checkpoints of one run, and "
            "branches have no order; leave it out"
        )
    return Average(mean_of_branches(inputs.checkpoints))


def _steps(inputs: Inputs) -> list[int] | None:
    """After how many steps each was saved, Θ0's first; None unless they fall, as those of a run."""
    steps = inputs.trajectory.training_steps
    if steps is None or any(float(one) <= float(other) for one, other in pairwise(steps)):
        return None
    return steps


def _of_times(inputs: Inputs, times: list[float], *, counts_steps: bool) -> Average:
    """The average of checkpoints by the times of their saving, oldest first, as its coefficients.

    Args:
        inputs: of the method.
        times: rising.
        counts_steps: whether times are training steps; if not, they count checkpoints.
    """
    shape, over = inputs.options["shape"], inputs.given("over")
    half_life = inputs.given("half-life")
    begin = times[0] if over is None else _beginning(times[-1], over)
    remarks = []
    if over is not None:
        remarks += _remarks_of_share(over, times, begin, is_decay=shape not in ORDERED)
    if shape != "uniform" and not counts_steps:
        spaced = "" if shape in ORDERED else "equally far apart, "
        remarks.append(
            "the checkpoints tell no training steps that fall from the first to the last: they "
            f"are taken for a run's, {spaced}the latest first"
        )
    if shape in ORDERED:
        taken = sum(time >= begin for time in times)
        weights = exponential_coefficients(taken) if shape == "exponential" else [1 / taken] * taken
        return Average((*(0.0,) * (len(times) - taken), *weights), tuple(remarks))
    if half_life is not None:
        unit = "training steps" if counts_steps else "checkpoints"
        remarks.append(f"--option half-life={half_life:.12g} is in {unit}")
    if len(times) == 1:
        return Average((1.0,), tuple(remarks))
    mean = (
        SHAPE_MEANS[str(shape)]
        if half_life is None
        else moving_mean((times[-1] - times[0]) / half_life)
    )
    return Average(tuple(decay_coefficients(times, begin, mean)), tuple(remarks))


def _beginning(end: float, over: float) -> float:
    """Where a share of the run begins; a step that it misses by rounding only is that step."""
    begin = end * (1 - over)
    return float(round(begin)) if abs(begin - round(begin)) < 1e-9 * end else begin


def _remarks_of_share(
    over: float, times: list[float], begin: float, *, is_decay: bool
) -> list[str]:
    """What of a decay over a share of the run the checkpoints cannot show."""
    start = f"--option over={over:g}: that share of the run begins at step {begin:.12g}"
    if begin < times[0]:
        stands = ", which stands for the weights at its beginning" if is_decay else ""
        oldest = f"the oldest checkpoint that is averaged, of step {times[0]:.12g}"
        return [f"{start}, before {oldest}{stands}"]
    if len(times) > 1 and begin > times[-2]:
        what = "is averaged with the one before only" if is_decay else "is all that is taken"
        return [f"{start}, after all but the latest checkpoint, which {what}"]
    return []


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        UsageError: options that these checkpoints cannot follow.
        CheckpointError: a checkpoint cannot be read.
    """
    average = average_of(inputs)
    weights = [average.coefficients[::-1]] * inputs.steps
    remarks = list(average.remarks)
    products = None
    # A single checkpoint is passed on as it is.
    if inputs.options["lora"] == "exact" and sum(c > 0 for c in average.coefficients) > 1:
        pairs = find_pairs(inputs.trajectory)
        remarks += pairs.remarks
        if pairs.names:
            products = ProductPredictor(pairs.names, average.coefficients)
    rows: LinearPredictor | BranchesPredictor
    if inputs.trajectory.kind is TrajectoryKind.BRANCHES:
        rows = BranchesPredictor(inputs.trajectory, inputs.steps, rounds_once=True)
    else:
        rows = LinearPredictor(dict.fromkeys(PREDICTED_KINDS, weights), rounds_once=True)
    return Predictors(
        rows,
        products,
        exact=rows,
        coefficients=average.coefficients,
        remarks=tuple(remarks),
        rows_at_once=rows_at_once() if isinstance(rows, LinearPredictor) else None,
    )
