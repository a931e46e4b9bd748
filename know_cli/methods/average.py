"""The mean of all checkpoints: a uniform soup of the trajectory.

"Model soups" (Wortsman et al., ICML 2022, arXiv 2203.05482) average fine-tuned models,
"Averaging Weights Leads to Wider Optima" (Izmailov et al., UAI 2018, arXiv 1803.05407) those
along one training run. A mean does not point to any larger data set, so every step has the same.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    size = inputs.checkpoints
    return combine([[1 / size] * size] * inputs.steps)
