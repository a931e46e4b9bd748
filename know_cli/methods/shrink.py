"""All weights times λ, as a control: the first half of shrink and perturb.

"On Warm-Starting Neural Network Training" (Ash & Adams, NeurIPS 2020, arXiv 1910.08475) starts
from λΘ0 plus noise. To first order KNOWN may act as such a shrinkage, so whatever KNOWN gains over
it comes from reading the history. Step n uses λ^n.

Weights of layers before a normalisation have no scale of their own: shrunk, they give the same
network, which the same learning rate moves more. Shrinking biases and the normalisation's own
weights changes the network, so biases stay unless all is asked for, and normalisation layers follow
their own setting.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.kinds import Kind
from know_cli.methods.combination import combine_by_kind, only
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    factors = [inputs.number("lambda") ** step for step in range(1, inputs.steps + 1)]
    shrunk = [only(-1, inputs.checkpoints, 1, factor)[0] for factor in factors]
    kept = only(-1, inputs.checkpoints, inputs.steps)
    of_bias = shrunk if inputs.options["of"] == "all" else kept
    return combine_by_kind({Kind.CONV: shrunk, Kind.FC: shrunk, Kind.BIAS: of_bias})
