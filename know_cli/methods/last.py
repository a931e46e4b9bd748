"""The most-forgotten checkpoint Θ(S−1), a control: what comes of more training on less data.

It is the same for every step.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """The method."""
    return combine(only(0, inputs.checkpoints, inputs.steps))
