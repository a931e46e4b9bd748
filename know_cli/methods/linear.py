"""A straight line in the session index, fitted to each parameter by least squares.

Ordinary least squares of θ against the index k = 0 … S − 1, evaluated at −n for step n. Every step
uses the line through the recorded checkpoints; nothing is iterated. If every checkpoint carries its
session number, that is the index, in units of the distance between checkpoints.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, line
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    positions = [float(k) for k in range(inputs.checkpoints)]
    if inputs.sessions is not None:
        first, stride = inputs.sessions[0].index, inputs.trajectory.stride
        positions = [(session.index - first) / stride for session in inputs.sessions]
    targets = [-float(step) for step in range(1, inputs.steps + 1)]
    return combine(line(positions[::-1], targets))
