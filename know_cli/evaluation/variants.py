"""The methods that are evaluated: labels, and the request that each stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.engine.settings import NormMode, Settings
from know_cli.errors import CheckpointError, UsageError
from know_cli.evaluation.tasks.task import RATE
from know_cli.files import remove_file, temporary_name
from know_cli.methods.bundles import find_bundle, load_bundle, method_of_bundle
from know_cli.methods.registry import DEFAULT_METHOD, Method, check_suited, find_method
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        label: name on the command line and in tables.
        request: keyword arguments of :class:`~know_cli.prediction.request.Request`.
        steps: whether the prediction depends on the number of steps; otherwise there is a single
            result, shown as step 1.
    """

    label: str
    request: Mapping[str, Any] = field(default_factory=dict)
    steps: bool = True


#: What can be evaluated: the shipped families of KNOWN, then the baselines among the methods of
#: ``know predict``. In n steps, shrink multiplies by λ^n.
VARIANTS: tuple[Variant, ...] = (
    Variant("continuation", {"weights": "continuation"}),
    Variant("retrodiction", {"weights": "retrodiction"}),
    Variant("average", {"method": "average"}, steps=False),
    Variant("average-forgotten-3", {"method": "average", "options": {"forgotten": 3}}, steps=False),
    Variant("shrink-0.9", {"method": "shrink", "options": {"lambda": 0.9, "of": "all"}}),
    Variant("task-vector", {"method": "task-vector"}),
    Variant("task-vector-full", {"method": "task-vector", "options": {"range": "full"}}),
    Variant("linear", {"method": "linear"}),
    Variant("logfit", {"method": "logfit", "options": {"of": "position"}}),
    Variant("tsv", {"method": "tsv"}),
    Variant("lstsq", {"method": "lstsq", "weights": "continuation"}),
    Variant("noise", {"method": "noise", "weights": "continuation"}),
)


def of_bundle(label: str, path: str) -> Variant:
    """The method that reads one of the user's bundles, with it."""
    method = method_of_bundle(path)
    if method.name == DEFAULT_METHOD:
        return Variant(label, {"weights": path})
    return Variant(label, {"weights": path, "method": method.name}, steps=False)


def method_of(variant: Variant) -> Method:
    """The method that a variant stands for."""
    return find_method(variant.request.get("method", DEFAULT_METHOD))


def find_variants(labels: Sequence[str]) -> list[Variant]:
    """The variants with these labels.

    Raises:
        UsageError: there is no method with that label.
    """
    every = {variant.label: variant for variant in VARIANTS}
    for label in labels:
        if label not in every:
            raise UsageError(f"unknown method {label!r}; choose from {', '.join(every)}")
    return [every[label] for label in dict.fromkeys(labels)]


def is_available(
    variant: Variant, sessions: int, trajectory: TrajectoryKind = TrajectoryKind.FORGETTING
) -> bool:
    """Whether a variant can read this many checkpoints.

    A hyper-model reads only one number of them, and a mean of some of them needs as many.

    Raises:
        UsageError: its bundle does not exist.
        CheckpointError: its bundle is corrupt, or was not taught on such trajectories.
    """
    if "weights" not in variant.request:
        return int(variant.request.get("options", {}).get("forgotten", 0)) <= sessions
    method, weights = method_of(variant), variant.request["weights"]
    try:
        path = find_bundle(method, weights, sessions)
    except CheckpointError:
        return False
    bundle = load_bundle(method, path)
    if bundle.trajectory is not trajectory:
        raise CheckpointError(
            f"{path}: was taught on {bundle.trajectory.plural}, and here {trajectory.plural} are "
            "measured; leave it out"
        )
    check_suited(method, trajectory, weights, bundle)
    return bundle.checkpoints == sessions


@cache
def _bundle_digest(method: str, weights: str, sessions: int) -> str:
    reader = find_method(method)
    return load_bundle(reader, find_bundle(reader, weights, sessions)).digest


def identity(variant: Variant, sessions: int, rate: float = RATE) -> dict[str, Any]:
    """In plain types, what determines predictions besides checkpoints and normalisation."""
    facts = {name: value for name, value in variant.request.items() if name != "weights"}
    if "weights" in variant.request:
        weights = variant.request["weights"]
        facts["bundle"] = _bundle_digest(method_of(variant).name, weights, sessions)
    return facts | {"sessions": sessions, "rate": rate}


def predict(
    variant: Variant,
    checkpoints: Sequence[Path],
    norm: NormMode | None,
    steps: int,
    rate: float | None = RATE,
    trajectory: TrajectoryKind | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Predict from checkpoints, Θ0 first.

    Args:
        variant: the method.
        checkpoints: files in one folder, where predictions are written temporarily.
        norm: treatment of normalisation layers; None is the method's own.
        steps: the most steps.
        rate: sampling rate of a forgetting; None takes the checkpoints' own.
        trajectory: how the checkpoints came about; None takes what they tell.

    Returns:
        The predicted state dicts, by step from 1.

    Raises:
        CheckpointError: the checkpoints or the bundle cannot be used.
        OutputError: predictions cannot be written.
    """
    output = checkpoints[0].with_name(temporary_name()).with_suffix(".safetensors")
    request = Request(
        checkpoints=checkpoints,
        output=output,
        settings=Settings(steps=steps if variant.steps else 1, norm=norm),
        rate=rate,
        every_step=True,
        device="cpu",
        trajectory=trajectory,
        **variant.request,
    )
    with open_prediction(request) as prediction:
        try:
            prediction.execute()
            return {written.step: read_state(written.path) for written in prediction.outputs}
        finally:
            for written in prediction.outputs:
                remove_file(written.path)
