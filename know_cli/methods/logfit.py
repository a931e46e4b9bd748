"""A straight line in a logarithm, fitted to each parameter by least squares.

``of=data``: θ = a + b·log |D|, evaluated at log |D0| + n·log(1/r) for step n. Sizes are the
recorded fractions if every checkpoint carries one, and r^k otherwise. If sizes are exactly r^k,
their logarithms are equally spaced and the line is that of ``linear``: the two differ only if the
recorded sizes are not geometric.

``of=position``: θ = a + b·log t over the position t = 1 … S in the order of the window,
most-forgotten first, evaluated at t = S + n. Changes slow down towards the end of the window.

Nothing is iterated.
"""

from __future__ import annotations

import math

from know_cli.engine.predictor import Predictors
from know_cli.errors import CheckpointError
from know_cli.methods.combination import combine, line
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        CheckpointError: all checkpoints have the same recorded share of the data.
    """
    size, steps = inputs.checkpoints, range(1, inputs.steps + 1)
    if inputs.options["of"] == "position":
        logarithms = [math.log(t) for t in range(1, size + 1)]
        return combine(line(logarithms, [math.log(size + step) for step in steps]))
    fractions = [inputs.rate**k for k in range(size)]
    if inputs.sessions is not None:
        fractions = [session.fraction for session in inputs.sessions]
    if len(set(fractions)) == 1:
        raise CheckpointError(
            f"{inputs.trajectory.first.path}: every checkpoint is recorded with the same share of "
            "the data, which gives no line; use --option of=position"
        )
    newest = math.log(fractions[0])
    return combine(
        line(
            [math.log(fraction) for fraction in reversed(fractions)],
            [newest - step * math.log(inputs.rate) for step in steps],
        )
    )
