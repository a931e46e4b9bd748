"""Θ0 as it is: what everyone starts from who does not predict (arXiv 2508.05059, "Naïve").

No step changes anything. Values of float64 are rounded to float32, as with every method.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """The method."""
    return combine(only(-1, inputs.checkpoints, inputs.steps))
