"""A trial as a loss landscape shows it: its checkpoints, predictions from them, and a measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from know_cli.checkpoints import save_checkpoint
from know_cli.checkpoints.metadata import METHOD, STEPS, Session
from know_cli.engine.settings import NormMode
from know_cli.errors import UsageError
from know_cli.evaluation.anchors import LONGER, MORE_DATA
from know_cli.evaluation.landscape_measure import LandscapeMeasure
from know_cli.evaluation.place import USUAL, Place
from know_cli.evaluation.release.fine_tuning import has_batch_norm
from know_cli.evaluation.release.plan import RELEASE_TASKS
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.evaluation.runs.averages import re_estimate
from know_cli.evaluation.tasks import TASKS
from know_cli.evaluation.tasks.measures import LOG_LIKELIHOOD
from know_cli.evaluation.tasks.task import RATE
from know_cli.evaluation.trial import Trial
from know_cli.evaluation.variants import Variant, predict
from know_cli.evaluation.weights import load
from know_cli.lab.fitting import one_thread

# Trials do not number theirs.
_TRAJECTORY = "0"

AnyTrial = Trial | ReleaseTrial


@dataclass(frozen=True)
class Pictured:
    """What is drawn of a trial.

    Attributes:
        sessions: files of its checkpoints, Θ0 first.
        predictions: files, each with the method that made it.
        others: files of what it is compared with, by name.
    """

    sessions: Sequence[Path]
    predictions: Sequence[Path]
    others: Mapping[str, Path]


def find_trial(
    name: str,
    seed: int,
    work: Path,
    data_folder: Path | None,
    place: Place = USUAL,
    first: Path | None = None,
) -> AnyTrial:
    """A trial of either regime, which was run.

    Args:
        name: of the task.
        seed: of the trial.
        work: folder of all trials.
        data_folder: where the data sets' files are.
        place: where it was trained.
        first: of the release regime, the checkpoint that it began with.

    Raises:
        UsageError: there is no such task or trial, or the task's data are missing.
    """
    trial: AnyTrial
    if name in RELEASE_TASKS:
        trial = ReleaseTrial(RELEASE_TASKS[name], seed, work, data_folder, place, first)
    elif name not in TASKS:
        raise UsageError(
            f"--task {name}: there is none; choose from {', '.join([*TASKS, *RELEASE_TASKS])}"
        )
    elif first is not None:
        raise UsageError(f"--from: task {name} is not of the release regime; leave it out")
    else:
        trial = Trial(TASKS[name], seed, work, data_folder, place)
    if not trial.folder.is_dir():
        raise UsageError(
            f"{trial.folder}: there is no such trial of task {name} with seed {seed}; run it with "
            "'know eval', and name the same --device, --precision, --from and data here"
        )
    return trial


@one_thread()
def pictured(trial: AnyTrial, variants: Sequence[Variant], folder: Path) -> Pictured:
    """Predict from a trial's checkpoints, which are trained again where they were not kept.

    Args:
        trial: with its folder.
        variants: methods that predict.
        folder: for the predictions.

    Raises:
        CheckpointError: a bundle cannot be used.
        OutputError: a file cannot be written.
    """
    sessions = trial.checkpoints()
    rate, steps = RATE, 3
    if isinstance(trial, ReleaseTrial):
        rate, steps = trial.task.rate, max(trial.task.steps)
    predictions: list[Path] = []
    for number, variant in enumerate(variants):
        states = predict(variant, sessions, NormMode.COPY, steps, rate)
        for step, state in states.items():
            path = folder / f"{number}-{step}.safetensors"
            # As of a prediction, so that its steps are one series.
            of = Session(-step, rate**-step, rate, _TRAJECTORY).to_metadata()
            told = {METHOD: variant.label, STEPS: str(step)}
            save_checkpoint(path, state, {"format": "pt", **of, **told})
            predictions.append(path)
    files = {"longer": LONGER, "more data": MORE_DATA}
    others = {
        name: path
        for name, file in files.items()
        if (path := trial.folder / f"{file}.safetensors").exists()
    }
    return Pictured(sessions, predictions, others)


def measured(
    trial: AnyTrial, measure: LandscapeMeasure
) -> tuple[Callable[[Mapping[str, Tensor]], float], str]:
    """The function of weights that a landscape shows, and its name.

    Running statistics are measured again for all weights, on the pre-training's examples, since
    those of Θ0 belong to Θ0.

    Args:
        trial: whose network and examples it takes.
        measure: of the pre-training's test examples.
    """
    problem = trial.problem
    own = problem.pretraining_measure
    statistics = has_batch_norm(problem.build(0))
    is_loss = measure is LandscapeMeasure.LOSS

    @one_thread()
    def function(state: Mapping[str, Tensor]) -> float:
        model = problem.build(0)
        load(model, state)
        if statistics:
            re_estimate(model, problem.pool)
        if is_loss:
            return -LOG_LIKELIHOOD.function(model, problem.test)
        return own.scale * own.function(model, problem.test)

    return function, "loss" if is_loss else f"{own.name} ({own.unit})"
