"""The linear rule, S numbers per kind, with the least squared error on the training windows.

Whatever a hyper-model gains over it comes from not being linear. The rule was fitted to the windows
that the bundle's KNOWN was trained on, by :func:`know_cli.meta.scores.least_squares`, and is read
from the bundle's manifest: ``"rule": {"conv": [S numbers], "fc": […], "bias": […]}``,
most-forgotten first, θ0 last.

The rule predicts one step. Like KNOWN, step n applies it to a window that ends with the n − 1
predictions before it, which amounts to a fixed combination of the recorded window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from know_cli.engine.predictor import Predictors
from know_cli.errors import CheckpointError
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.known.bundle import Bundle
from know_cli.known.shipped import MANIFEST
from know_cli.methods.combination import combine_by_kind
from know_cli.methods.inputs import Inputs

#: Name of the entry in the manifest.
RULE = "rule"


def predictors(inputs: Inputs) -> Predictors:
    """Open the method.

    Raises:
        CheckpointError: the bundle has no such rule, or is for another number of checkpoints.
    """
    rules = read_rules(inputs.bundle_of(Bundle))
    return combine_by_kind({kind: iterate(rules[kind], inputs.steps) for kind in PREDICTED_KINDS})


def read_rules(bundle: Bundle) -> dict[Kind, list[float]]:
    """Read the rule of each kind: ``[S]`` weights, most-forgotten first, θ0 last.

    Raises:
        CheckpointError: the manifest has no rule, or one of another form.
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
    """Turn a one-step rule ``[S]`` into weights ``[steps][S]`` of the recorded window.

    >>> iterate([-1.0, 2.0], 2)
    [[-1.0, 2.0], [-2.0, 3.0]]
    """
    size = len(rule)
    # Each value of the window, then each prediction, as a combination of the window's values.
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
