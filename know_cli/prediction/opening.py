"""A request checked against its files and planned: each question is asked once, here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from know_cli.checkpoints import Trajectory, open_trajectory
from know_cli.checkpoints.folders import check_other_files
from know_cli.checkpoints.layouts import SUFFIX
from know_cli.checkpoints.metadata import Session, TrajectoryKind
from know_cli.checkpoints.output_checks import check_digest_name, check_output, name_notices
from know_cli.checkpoints.paths import step_path
from know_cli.checkpoints.trajectory import data_notices
from know_cli.engine.classification import Classified, classify_values
from know_cli.engine.devices import choose_devices
from know_cli.engine.job import OutputStep
from know_cli.engine.movements import Movements, measure_movements
from know_cli.engine.notices import Notices
from know_cli.engine.planning import make_plan
from know_cli.engine.predictor import Predictors
from know_cli.engine.settings import NormMode
from know_cli.errors import OutputError, UsageError
from know_cli.files import destination
from know_cli.files.protected import Protected, is_within
from know_cli.kinds import Kind, Override, only_copied
from know_cli.known.language import is_of_language
from know_cli.known.shipped import DEFAULT_WEIGHTS
from know_cli.methods.bundles import open_bundle
from know_cli.methods.inputs import Inputs
from know_cli.methods.registry import DEFAULT_METHOD, HyperModelBundle, check_suited
from know_cli.prediction.predict import Prediction
from know_cli.prediction.recipe import Arithmetic, Recipe, output_metadata
from know_cli.prediction.request import DEFAULT_RATE, Request
from know_cli.ranks.alone import Ranks

_ON_LANGUAGE = (
    "warning: these look like a language model or an adapter, and on those that were measured "
    f"KNOWN {DEFAULT_WEIGHTS} was a worse start than the first checkpoint, which --weights "
    "retrodiction in one step was not; measure both, as 'know choose' does"
)


def open_prediction(
    request: Request, ranks: Ranks | None = None, tell: Callable[[str], None] | None = None
) -> Prediction:
    """Check a request against the files and plan it; reads headers and little else.

    Args:
        request: what is wanted.
        ranks: that all call this with the same request to share the work; None is this process
            alone.
        tell: is given what the user should know, line by line, now and when it is executed.

    Raises:
        UsageError: options that cannot be followed, such as a tensor that the method needs whole
            and ``max_memory`` does not hold.
        CheckpointError: inputs or a bundle that cannot be used.
        OutputError: an output that must not or cannot be written.
        PeerError: another rank has failed.
    """
    ranks, notices = ranks or Ranks(), Notices(tell)
    devices = choose_devices(request.device, ranks.local_rank if ranks.size > 1 else None)
    trajectory = open_trajectory(
        request.checkpoints,
        only_copied(request.settings.overrides),
        request.trajectory,
        request.chosen.fewest,
    )
    try:
        reading = Reading(trajectory, request.settings.overrides, ranks, notices)
        return plan_prediction(request, reading, devices)
    except BaseException:
        trajectory.close()
        raise


class Reading:
    """Open inputs, and what was found in them, each looked for once.

    Args:
        trajectory: the inputs.
        overrides: kinds that the user sets.
        ranks: that share the work.
        notices: is told what the user should know.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        overrides: Sequence[Override],
        ranks: Ranks,
        notices: Notices,
    ) -> None:
        self.trajectory, self.ranks, self.notices = trajectory, ranks, notices
        self._overrides = overrides
        self._classified: dict[bool, Classified] = {}
        self._movements: dict[tuple[str, ...], Mapping[str, Movements]] = {}

    def classified(self, *, rescales: bool) -> Classified:
        """What the tensors are; see :func:`~know_cli.engine.classification.classify_values`."""
        if rescales not in self._classified:
            self._classified[rescales] = classify_values(
                self.trajectory, self._overrides, self.ranks, rescales=rescales
            )
        return self._classified[rescales]

    def movements(self, names: Sequence[str]) -> Mapping[str, Movements]:
        """How far tensors move; see :func:`~know_cli.engine.movements.measure_movements`."""
        key = tuple(names)
        if key not in self._movements:
            self._movements[key] = measure_movements(self.trajectory, names, self.ranks)
        return self._movements[key]


def plan_prediction(
    request: Request, reading: Reading, devices: tuple[torch.device, ...], beside: int = 0
) -> Prediction:
    """Check a request against open inputs and plan it; see :func:`open_prediction`.

    Args:
        request: what is wanted.
        reading: the inputs, which stay open.
        devices: that the request names.
        beside: how many other predictions are executed in the same pass.
    """
    trajectory, ranks, notices = reading.trajectory, reading.ranks, reading.notices
    check_suited(request.chosen, trajectory.kind, request.weights)
    bundle = open_bundle(request.chosen, request.weights, len(trajectory))
    check_suited(request.chosen, trajectory.kind, request.weights, bundle)
    notices.add(*trajectory.notices, *data_notices(trajectory))
    rate = _rate(request, trajectory, notices)
    inputs = Inputs(
        trajectory, request.settings.steps, rate, devices, request.options, bundle, request.kernel
    )
    predictors: Predictors = import_module(request.chosen.module).predictors(inputs)
    notices.add(*predictors.notices)
    recipe = Recipe.of(request, trajectory, rate, bundle, devices[0].type, predictors)
    outputs = _outputs(request, trajectory, recipe)
    if request.rewrite:
        for output in outputs:
            _check_output(output.path, request, trajectory, bundle)
        if trajectory.first.is_folder:
            check_other_files(trajectory.first)
        else:
            notices.add(*name_notices(request.output))
    check_agreement(ranks, recipe, predictors, outputs)
    _check_places(ranks, request, outputs)
    found = reading.classified(rescales=request.settings.norm is NormMode.RESCALE)
    notices.add(*found.notices)
    if request.weights is None and request.method == DEFAULT_METHOD:
        shapes = {name: entry.shape for name, entry in trajectory.first.tensors.items()}
        if is_of_language(shapes, {name: of.kind for name, of in found.classes.items()}):
            notices.add(_ON_LANGUAGE)
    unordered = (
        trajectory.kind is TrajectoryKind.FORGETTING
        and Session.from_metadata(trajectory.first.metadata) is None
    )
    if found.scan.looks_reversed and unordered:
        notices.add(
            "warning: the steps between checkpoints grow, as if they were given in reverse; "
            "the order is full data first, most-forgotten last"
        )
    movements = None
    if predictors.reads_movements:
        movements = reading.movements(
            [
                name
                for name, of in found.classes.items()
                if of.kind is not Kind.COPY
                and name not in found.scan.frozen
                and name not in trajectory.absent
            ]
        )
    plan = make_plan(
        trajectory,
        request.settings,
        found.classes,
        found.scan.frozen,
        found.layers,
        predictors=predictors,
        outputs=len(outputs),
        movements=movements,
        beside=beside,
    )
    if not plan.predicts:
        notices.add(
            "warning: no tensor is predicted; the output has the first checkpoint's weights"
        )
    return Prediction(
        request, trajectory, bundle, recipe, plan, outputs, predictors, notices, ranks
    )


def check_agreement(
    ranks: Ranks, recipe: Recipe, predictors: Predictors, outputs: Sequence[OutputStep]
) -> None:
    """Refuse to start if the ranks are not about to do parts of the same.

    Args:
        ranks: that share the work.
        recipe: this rank's.
        predictors: this rank's.
        outputs: this rank's; their metadata also tell what Θ0's header has.

    Raises:
        UsageError: on rank 0; another rank's are different.
        PeerError: on the others, then.
    """
    if ranks.size == 1:
        return
    metadata = [[output.step, dict(output.metadata)] for output in outputs]
    _agree(ranks, [recipe.identity(Arithmetic.of(predictors)), metadata])


def _check_places(ranks: Ranks, request: Request, outputs: Sequence[OutputStep]) -> None:
    """Refuse to start if the ranks are not about to write the same outputs in the same way."""
    places = [[output.step, str(output.path), output.force] for output in outputs]
    _agree(ranks, [places, request.resume, request.checksum])


def _agree(ranks: Ranks, facts: list[Any]) -> None:
    own = json.dumps(facts, sort_keys=True)
    for rank, found in enumerate(ranks.gather(own)):
        if found != own:
            raise UsageError(
                f"rank {rank} has other checkpoints, outputs, options, devices, processors or "
                "versions than rank 0; start all ranks with the same command and installation, on "
                "machines alike"
            )
    ranks.broadcast(None)


def _check_output(
    output: Path, request: Request, trajectory: Trajectory, bundle: HyperModelBundle | None
) -> None:
    if request.names_folder and not trajectory.first.is_folder:
        raise OutputError(
            f"{output}/: is the name of a folder, but the output is a file as the first checkpoint "
            f"is; name the file, such as {output}{SUFFIX}"
        )
    if bundle and bundle.source and is_within(output, bundle.source):
        raise OutputError(f"{output}: is in the bundle in use; name another output")
    if bundle and bundle.source:
        Protected([], [bundle.source]).refuse(output, [output, destination(output)])
    check_output(
        output,
        trajectory.checkpoints,
        is_folder=trajectory.first.is_folder,
        force=request.force,
    )
    if request.checksum:
        check_digest_name(output)


def _rate(request: Request, trajectory: Trajectory, notices: Notices) -> float:
    recorded = trajectory.rate
    if trajectory.kind is not TrajectoryKind.FORGETTING:
        if request.rate is not None:
            raise UsageError(
                f"--rate {request.rate:g}: is the sampling rate of a forgetting, and these "
                f"checkpoints are of {trajectory.kind.text}; leave it out"
            )
        return DEFAULT_RATE
    if request.rate is None:
        return DEFAULT_RATE if recorded is None else recorded
    if recorded is not None and abs(recorded - request.rate) > 1e-6:
        notices.add(
            f"warning: --rate {request.rate:g}, but the checkpoints were recorded at {recorded:g}"
        )
    return request.rate


def _outputs(request: Request, trajectory: Trajectory, recipe: Recipe) -> list[OutputStep]:
    steps, first = request.settings.steps, trajectory.first
    paths = {steps: request.output}
    paths |= request.also
    if request.every_step:
        for step in range(1, steps):
            paths[step] = step_path(request.output, recipe.known_rate, step, first.is_folder)
    if len(set(paths.values())) < len(paths):
        raise UsageError(
            f"--every-step: at a rate of {recipe.rate:g} the steps have the same names; leave it "
            "out"
        )
    return [
        OutputStep(step, path, output_metadata(recipe, trajectory, step), request.force)
        for step, path in sorted(paths.items())
    ]
