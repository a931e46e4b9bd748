"""The most-forgotten checkpoint Θ(S−1), as a control: more training on less data.

Every step has the same.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    return combine(only(0, inputs.checkpoints, inputs.steps))
