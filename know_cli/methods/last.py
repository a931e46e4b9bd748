"""The most-forgotten checkpoint Θ(S−1), as a control: more training on less data.

Every step has the same. It is an average in which the others have no share, so that normalisation
layers are those of that checkpoint, too, running statistics included.
"""

from __future__ import annotations

from dataclasses import replace

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    count = inputs.checkpoints
    shares = (*[0.0] * (count - 1), 1.0)
    return replace(combine(only(0, count, inputs.steps)), coefficients=shares)
