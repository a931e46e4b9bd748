"""Θ0 unchanged: the start of anyone who does not predict (arXiv 2508.05059, "Naïve").

Every step has the same, bit for bit.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    return combine(only(-1, inputs.checkpoints, inputs.steps))
