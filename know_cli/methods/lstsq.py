"""The linear rule of S numbers a kind that had the least squared error on training windows.

What a hyper-model gains over it is gained by not being linear. The rule was fitted to the
windows that the bundle's KNOWN was trained on, by :func:`know_cli.meta.scores.least_squares`,
and is read from the bundle's manifest: ``"rule": {"conv": [S numbers], "fc": […],
"bias": […]}``, most-forgotten first, θ0 last.

The rule is of one step; step n applies it to the window that the n − 1 predictions before it
have shifted, as KNOWN does. What that amounts to is a fixed combination of the recorded window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from know_cli.engine.predictor import Predictors
from know_cli.errors import CheckpointError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import Bundle
from know_cli.known.shipped import MANIFEST
from know_cli.methods.combination import LinearPredictor
from know_cli.methods.inputs import Inputs

#: The manifest's entry.
RULE = "rule"


def predictors(inputs: Inputs) -> Predictors:
    """The method.

    Raises:
        CheckpointError: the bundle has no such rule, or reads windows of another length.
    """
    rules = read_rules(inputs.bundle_of(Bundle))
    return Predictors(
        LinearPredictor({kind: iterate(rules[kind], inputs.steps) for kind in PREDICTED_KINDS})
    )


def read_rules(bundle: Bundle) -> dict[Kind, list[float]]:
    """The rule of each kind: ``[S]`` weights, most-forgotten first, θ0 last.

    Raises:
        CheckpointError: the manifest has none, or what it has is no such rule.
    """
    rules = bundle.manifest.get(RULE)
    if rules is None:
        raise CheckpointError(
            f"{bundle.source}: has no {RULE!r} in a {MANIFEST}, which --method lstsq applies; "
            "take a bundle that has one, or train one with 'know train'"
        )
    result = {}
    for kind in PREDICTED_KINDS:
        rule = rules.get(kind.value) if isinstance(rules, dict) else None
        if (
            not isinstance(rule, list)
            or len(rule) != bundle.checkpoints
            or not all(type(number) in (int, float) and math.isfinite(number) for number in rule)
        ):
            raise CheckpointError(
                f"{bundle.source}: {RULE!r} in {MANIFEST} must have {bundle.checkpoints} finite "
                f"numbers for {kind.value}"
            )
        result[kind] = [float(number) for number in rule]
    return result


def iterate(rule: Sequence[float], steps: int) -> list[list[float]]:
    """Weights ``[steps][S]`` of the recorded window for a rule ``[S]`` of one step.

    >>> iterate([-1.0, 2.0], 2)
    [[-1.0, 2.0], [-2.0, 3.0]]
    """
    size = len(rule)
    # Each value of the window, and then each prediction, as a combination of the window.
    values = [[float(row == column) for column in range(size)] for row in range(size)]
    for step in range(steps):
        shifted = values[step:]
        values.append(
            [
                math.fsum(weight * value[k] for weight, value in zip(rule, shifted, strict=True))
                for k in range(size)
            ]
        )
    return values[size:]
