"""From paths and wishes to a written checkpoint: what ``know predict`` does, as a library.

>>> from pathlib import Path
>>> from know_cli.methods.prediction import Request, open_prediction
>>> request = Request([Path(f"ckpt{k}.safetensors") for k in range(5)], Path("out.safetensors"))
>>> with open_prediction(request) as prediction:  # doctest: +SKIP
...     report = prediction.execute()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from know_cli import __version__
from know_cli.bundles import find_bundle
from know_cli.checkpoints import Sink, Trajectory, open_trajectory
from know_cli.checkpoints import metadata as keys
from know_cli.checkpoints.digest import (
    check_digest_output,
    digest_path,
    remove_digest,
    write_digest,
)
from know_cli.checkpoints.layouts import SUFFIX
from know_cli.checkpoints.metadata import Session
from know_cli.checkpoints.output import check_output
from know_cli.checkpoints.paths import factor_name, step_path
from know_cli.checkpoints.trajectory import data_notices
from know_cli.engine.devices import choose_devices
from know_cli.engine.journal import Journal, file_identity, remove_journals
from know_cli.engine.plan import Action, Plan, Settings, classify_trajectory, make_plan
from know_cli.engine.predictor import Predictors
from know_cli.engine.progress import Progress, Silent
from know_cli.engine.ranks import Ranks
from know_cli.engine.report import Report
from know_cli.engine.run import OutputStep, execute
from know_cli.engine.scan import scan
from know_cli.errors import OutputError, UsageError
from know_cli.hypermodel import Bundle, load_bundle
from know_cli.kinds import Kind
from know_cli.methods.inputs import Inputs
from know_cli.methods.registry import (
    DEFAULT_METHOD,
    Method,
    Value,
    check_weights,
    complete_options,
    find_method,
)

DEFAULT_RATE = 0.5
DEFAULT_WEIGHTS = "continuation"


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        checkpoints: Θ0 (full data) first, most-forgotten last.
        output: file or folder to write, as Θ0 is one or the other.
        weights: name of a shipped family, or a path; see
            :func:`~know_cli.bundles.find_bundle`. None is :data:`DEFAULT_WEIGHTS` for methods
            that read a bundle, and the only choice for the others.
        settings: steps, normalisation and so on.
        rate: sampling rate of the forgetting; None takes the checkpoints' own, else 0.5.
        every_step: also write each intermediate step.
        device: for methods with a hyper-model, one of those that
            :func:`~know_cli.engine.devices.choose_devices` knows; the others compute on the CPU.
        force: replace existing outputs.
        method: name of a method; see :data:`~know_cli.methods.registry.METHODS`.
        options: values for some of the method's options; the others have their defaults.
        resume: keep a journal beside the output until it is complete, and go on from the one
            that is there, if it is of the same inputs and wishes.
        checksum: also write each output's digest; see :mod:`know_cli.checkpoints.digest`.
        rewrite: whether the output is to be written; if not, it is one that exists and is only
            compared with.
        names_folder: whether the output was given as a folder's name, with a slash at its end.
    """

    checkpoints: Sequence[Path]
    output: Path
    weights: str | None = None
    settings: Settings = field(default_factory=Settings)
    rate: float | None = None
    every_step: bool = False
    device: str = "auto"
    force: bool = False
    method: str = DEFAULT_METHOD
    options: Mapping[str, Value] = field(default_factory=dict)
    resume: bool = False
    checksum: bool = False
    rewrite: bool = True
    names_folder: bool = False


@dataclass
class Prediction:
    """A request with everything checked and planned; nothing is written yet.

    Attributes:
        request: what was asked for.
        trajectory: the open inputs, in order.
        method: what predicts.
        options: the value of each of its options.
        bundle: the KNOWN; None where the method reads none.
        rate: sampling rate that names the factor.
        plan: what happens to each tensor.
        outputs: what is written.
        notices: what the user should know before it starts.
        ranks: that share the work, of which this process is one.
    """

    request: Request
    trajectory: Trajectory
    method: Method
    options: dict[str, Value]
    bundle: Bundle | None
    rate: float
    plan: Plan
    outputs: list[OutputStep]
    notices: list[str]
    ranks: Ranks
    _predictors: Predictors

    def _where(self) -> dict[str, str]:
        """Where it is computed, several devices with commas, and by which kernel there."""
        where = {"device": ", ".join(map(str, self._predictors.devices))}
        kernel = self._predictors.kernel
        return where if kernel is None else {**where, "kernel": kernel}

    @property
    def factor(self) -> str:
        """Factor of training data that the output stands for, such as ``x2``."""
        return factor_name(self.rate, self.request.settings.steps)

    @property
    def files(self) -> list[Path]:
        """Every file and folder that is read or written."""
        inputs = self.trajectory.checkpoints
        files = [file for checkpoint in inputs for file in (checkpoint.path, *checkpoint.headers)]
        digests = [digest_path(output.path) for output in self.outputs]
        return [*files, *(output.path for output in self.outputs), *digests]

    @property
    def block_rows(self) -> int:
        """Rows of a block; each is computed alike wherever batches are cut."""
        return self._predictors.rows.block_rows

    def execute(self, progress: Progress | None = None) -> Report:
        """Predict and write; see :func:`know_cli.engine.run.execute`."""
        progress, ranks = progress or Silent(), self.ranks
        with ExitStack() as stack:
            journal = None
            if self.request.resume:
                journal = stack.enter_context(
                    Journal(self.request.output, self._identity(), ranks.rank, ranks.size)
                )
            report = self.run(self.plan, progress, journal=journal)
        if ranks.rank:
            return report
        remove_journals(self.request.output)
        for output in self.outputs:
            if self.request.checksum:
                progress.phase(f"computing the digest of {output.path}")
                report.digests.append(write_digest(output.path))
            else:
                remove_digest(output.path)
        report.notices = [*self.notices, *report.notices]
        return report

    def run(
        self,
        plan: Plan,
        progress: Progress,
        open_sink: Callable[[OutputStep], Sink] | None = None,
        journal: Journal | None = None,
    ) -> Report:
        """Run a plan, this prediction's own or a part of it, into some other place, too."""
        return execute(
            self.trajectory,
            plan,
            self.request.settings,
            self._predictors,
            self.outputs,
            progress,
            journal,
            open_sink,
            self.ranks,
        )

    def _identity(self) -> str:
        """Everything that the bytes of a batch depend on, as text."""
        files = [path for c in self.trajectory.checkpoints for path in c.headers]
        wishes = self.describe()
        for name in ("checkpoints", "threads", "max_memory", "memory", "device"):
            del wishes[name]
        tensors = [
            (tensor.name, tensor.kind.value, tensor.action.value, tensor.whole)
            for tensor in self.plan.tensors
        ]
        return json.dumps(
            {
                "files": [file_identity(path) for path in files],
                "wishes": wishes,
                "torch": torch.__version__,
                "processors": _processors(self._predictors),
                "allow_nonfinite": self.request.settings.allow_nonfinite,
                "rows": [self.plan.batch_rows, self._predictors.rows.block_rows],
                "outputs": [[output.step, dict(output.metadata)] for output in self.outputs],
                "tensors": tensors,
            },
            sort_keys=True,
        )

    def describe(self) -> dict[str, Any]:
        """The request as plain types, for a JSON report."""
        settings = self.request.settings
        bundle = {}
        if self.bundle is not None:
            bundle = {"bundle": self.bundle.digest, "target": self.bundle.target}
        return {
            "version": __version__,
            "method": self.method.name,
            "options": self.options,
            "checkpoints": [str(checkpoint.path) for checkpoint in self.trajectory.checkpoints],
            "steps": settings.steps,
            "rate": self.rate,
            "factor": self.factor,
            **bundle,
            "norm": settings.norm.value,
            "frozen": settings.frozen.value,
            **self._where(),
            "threads": settings.threads,
            "max_memory": settings.max_memory,
            "memory": self.plan.memory,
            "ranks": self.ranks.size,
        }

    def close(self) -> None:
        """Close the inputs."""
        self.trajectory.close()

    def __enter__(self) -> Prediction:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_prediction(request: Request, ranks: Ranks | None = None) -> Prediction:
    """Check a request against the files and plan it; reads headers and little else.

    Args:
        request: what is wanted.
        ranks: that all call this with the same request to share the work; None is this process
            alone.

    Raises:
        UsageError: wishes that cannot be followed, such as an option that the method does not
            have, or a tensor that it needs whole and ``max_memory`` does not hold.
        CheckpointError: inputs or a bundle that cannot be used.
        OutputError: an output that must not or cannot be written.
        PeerError: another rank has failed.
    """
    ranks = ranks or Ranks()
    method = find_method(request.method)
    options = complete_options(method, request.options)
    check_weights(method, request.weights)
    local_rank = ranks.local_rank if ranks.size > 1 else None
    devices = choose_devices(request.device, local_rank)
    trajectory = open_trajectory(request.checkpoints, request.settings.overrides)
    try:
        bundle = None
        if method.reads_bundle:
            weights = DEFAULT_WEIGHTS if request.weights is None else request.weights
            bundle = load_bundle(find_bundle(weights, len(trajectory)))
        notices = [*trajectory.notices, *data_notices(trajectory)]
        rate = _rate(request, trajectory, notices)
        predictors: Predictors = import_module(method.module).predictors(
            Inputs(trajectory, request.settings.steps, rate, devices, options, bundle)
        )
        notices += predictors.notices
        provenance = _provenance(method, options, bundle, request, trajectory, devices)
        outputs = _outputs(request, trajectory, rate, provenance)
        if request.rewrite:
            for output in outputs:
                _check_output(output.path, request, trajectory, bundle)
        _check_agreement(ranks, predictors, outputs)
        classes = classify_trajectory(trajectory, request.settings.overrides)
        names = [name for name, of in classes.items() if of.kind is not Kind.COPY]
        found = scan(trajectory, names, ranks)
        unordered = Session.from_metadata(trajectory.first.metadata) is None
        if found.looks_reversed and unordered:
            notices.append(
                "warning: the steps between checkpoints grow, as if they were given in reverse; "
                "the order is full data first, most-forgotten last"
            )
        plan = make_plan(
            trajectory,
            request.settings,
            found.frozen,
            predictors=predictors,
            outputs=len(outputs),
        )
        if not plan.with_action(Action.PREDICT):
            notices.append(
                "warning: no tensor is predicted; the output has the first checkpoint's weights"
            )
    except BaseException:
        trajectory.close()
        raise
    return Prediction(
        request,
        trajectory,
        method,
        options,
        bundle,
        rate,
        plan,
        outputs,
        notices,
        ranks,
        predictors,
    )


def _processors(predictors: Predictors) -> list[str]:
    """Models of what computes, in other words what results may depend on to the last bit."""
    names = {
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        for device in predictors.devices
    }
    return [torch.backends.cpu.get_cpu_capability(), *sorted(names)]


def _check_agreement(ranks: Ranks, predictors: Predictors, outputs: Sequence[OutputStep]) -> None:
    """Refuse to start if the ranks are not about to do parts of the same.

    The outputs' metadata tell inputs, method and wishes.

    Raises:
        UsageError: on rank 0; another rank's are different.
        PeerError: on the others, then.
    """
    if ranks.size == 1:
        return
    metadata = [[output.step, dict(output.metadata)] for output in outputs]
    how = [predictors.rows.block_rows, predictors.kernel, _processors(predictors)]
    own = json.dumps([torch.__version__, how, metadata], sort_keys=True)
    for rank, found in enumerate(ranks.gather(own)):
        if found != own:
            raise UsageError(
                f"rank {rank} has other checkpoints, options, devices, processors or versions than "
                "rank 0; start all ranks with the same command and installation, on machines alike"
            )
    ranks.broadcast(None)


def _check_output(
    output: Path, request: Request, trajectory: Trajectory, bundle: Bundle | None
) -> None:
    if request.names_folder and not trajectory.first.is_folder:
        raise OutputError(
            f"{output}/: is the name of a folder, but the output is a file as the first checkpoint "
            f"is; name the file, such as {output}{SUFFIX}"
        )
    if bundle and bundle.source and output.resolve().is_relative_to(bundle.source.resolve()):
        raise OutputError(f"{output}: is in the bundle in use; name another output")
    check_output(
        output,
        trajectory.checkpoints,
        is_folder=trajectory.first.is_folder,
        force=request.force,
    )
    check_digest_output(output, trajectory.checkpoints, force=request.force)


def _rate(request: Request, trajectory: Trajectory, notices: list[str]) -> float:
    recorded = trajectory.rate
    if request.rate is None:
        return DEFAULT_RATE if recorded is None else recorded
    if keys.rate_problem(request.rate) is not None:
        raise UsageError(f"--rate {request.rate}: must be between 0 and 1, such as 0.5 or 1/3")
    if recorded is not None and abs(recorded - request.rate) > 1e-6:
        notices.append(
            f"warning: --rate {request.rate:g}, but the checkpoints were recorded at {recorded:g}"
        )
    return request.rate


def _provenance(
    method: Method,
    options: Mapping[str, Value],
    bundle: Bundle | None,
    request: Request,
    trajectory: Trajectory,
    devices: Sequence[torch.device],
) -> dict[str, str]:
    """The metadata that tell the method and its wishes, and which inputs it was given.

    No times or paths, so that bytes repeat; enough for 'know verify' to compute it again.
    """
    settings = request.settings
    provenance = {
        keys.METHOD: method.name,
        keys.NORM: settings.norm.value,
        keys.FROZEN: settings.frozen.value,
        keys.DEVICE: devices[0].type,
        keys.CHECKPOINTS: str(len(trajectory)),
        keys.INPUTS: " ".join(c.fingerprint() for c in trajectory.checkpoints),
    }
    if options:
        provenance[keys.OPTIONS] = json.dumps(options, sort_keys=True)
    if settings.overrides:
        texts = [f"{override.pattern}={override.kind.value}" for override in settings.overrides]
        provenance[keys.KINDS] = json.dumps(texts)
    if settings.allow_nonfinite:
        provenance[keys.NONFINITE] = "copy"
    if bundle is not None:
        provenance |= {keys.BUNDLE: bundle.digest, keys.TARGET: bundle.target}
    return provenance


def _outputs(
    request: Request, trajectory: Trajectory, rate: float, provenance: Mapping[str, str]
) -> list[OutputStep]:
    steps, first = request.settings.steps, trajectory.first
    paths = {steps: request.output}
    if request.every_step:
        for step in range(1, steps):
            paths[step] = step_path(request.output, rate, step, first.is_folder)
    if len(set(paths.values())) < len(paths):
        raise UsageError(
            f"--every-step: at a rate of {rate:g} the steps have the same names; leave it out"
        )
    return [
        OutputStep(step, path, _metadata(trajectory, rate, provenance, step), request.force)
        for step, path in sorted(paths.items())
    ]


def _metadata(
    trajectory: Trajectory,
    rate: float,
    provenance: Mapping[str, str],
    step: int,
) -> dict[str, str]:
    """Θ0's metadata and what made this output."""
    # transformers 4 reads no file that does not say which framework's tensors it has.
    metadata = {"format": "pt", **trajectory.first.metadata}
    # Θ0 may be a prediction itself, with another method, and so with more to tell.
    for key in (keys.OPTIONS, keys.KINDS, keys.NONFINITE, keys.BUNDLE, keys.TARGET):
        metadata.pop(key, None)
    session = Session.from_metadata(metadata)
    if session is not None:
        # A prediction takes its place in the trajectory: the session before the first.
        metadata |= Session(
            session.index - step * trajectory.stride,
            session.fraction / rate**step,
            session.rate,
            session.trajectory,
        ).to_metadata()
    return {
        **metadata,
        **provenance,
        keys.VERSION: __version__,
        keys.STEPS: str(step),
        keys.RATE: repr(rate),
    }
