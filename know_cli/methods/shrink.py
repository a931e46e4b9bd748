"""All weights times λ: the first half of shrink and perturb, and a control.

"On Warm-Starting Neural Network Training" (Ash & Adams, NeurIPS 2020, arXiv 1910.08475) starts
from λΘ0 plus noise. To first order KNOWN may act as such a shrinkage, so whatever it gains over
this one is gained by reading the history. Step n takes λ^n.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """The method."""
    factors = [inputs.number("lambda") ** step for step in range(1, inputs.steps + 1)]
    return combine([only(-1, inputs.checkpoints, 1, factor)[0] for factor in factors])
