"""Task arithmetic: from Θ0, the opposite of what forgetting did.

Θk is Θ0 fine-tuned, so Θk − Θ0 is a task vector, and forgetting it is Θ0 − α·(Θk − Θ0): negation
in "Editing Models with Task Arithmetic" (Ilharco et al., ICLR 2023, arXiv 2212.04089). k is 1
(``range=session``), or S − 1 for the whole trajectory (``range=full``).

Step n uses n·α, the scaling coefficient of task arithmetic; nothing is iterated. With
``range=session`` and α = 1, iterating would give the same.
"""

from __future__ import annotations

from know_cli.engine.predictor import Predictors
from know_cli.methods.combination import combine
from know_cli.methods.inputs import Inputs


def predictors(inputs: Inputs) -> Predictors:
    """Open the method."""
    alpha, size = inputs.number("alpha"), inputs.checkpoints
    other = 0 if inputs.options["range"] == "full" else size - 2
    weights = []
    for step in range(1, inputs.steps + 1):
        row = [0.0] * size
        row[-1], row[other] = 1 + step * alpha, -step * alpha
        weights.append(row)
    return combine(weights)
