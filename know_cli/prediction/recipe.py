"""All that the bytes of an output depend on, described once.

From a :class:`Recipe` come the header's metadata, the key of a journal, what ranks agree on, the
JSON report, and the request that ``know verify`` replays; :meth:`Recipe.from_metadata` reads it
back from a header. Whatever is to change bytes becomes a field here, and so reaches all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from know_cli import __version__
from know_cli.checkpoints import Trajectory
from know_cli.checkpoints import metadata as keys
from know_cli.checkpoints.metadata import Session, TrajectoryKind
from know_cli.checkpoints.paths import factor_name
from know_cli.engine.predictor import Predictors
from know_cli.engine.settings import MAX_STEPS, FrozenMode, NormMode, Settings
from know_cli.kinds import Override, parse_override
from know_cli.known.kernels import AUTO, KERNELS
from know_cli.methods.registry import HyperModelBundle, Value
from know_cli.prediction.request import DEFAULT_RATE, Request

# Keys that an output has only sometimes; Θ0 may be a prediction itself, or chosen, and have others.
_SOMETIMES = (
    keys.OPTIONS,
    keys.KINDS,
    keys.NONFINITE,
    keys.BUNDLE,
    keys.TARGET,
    keys.KERNEL,
    keys.COEFFICIENTS,
    keys.CHOSEN,
    keys.BRANCH,
    keys.SEED,
)
# What Θ0 may have of another trajectory, in which it was recorded.
_OF_FORGETTINGS = (
    keys.SESSION,
    keys.FRACTION,
    keys.RATE,
    keys.TRAJECTORY,
    keys.REGIME,
    keys.CONTINUATION,
)


@dataclass(frozen=True)
class Arithmetic:
    """What results depend on to the last bit, beside all that a header has.

    Attributes:
        torch: its version.
        processors: models of what computes.
        block_rows: rows of a block.
    """

    torch: str
    processors: tuple[str, ...]
    block_rows: int

    @staticmethod
    def of(predictors: Predictors) -> Arithmetic:
        """That of a method on the devices that it is opened on."""
        names = {
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            for device in predictors.devices
        }
        processors = (torch.backends.cpu.get_cpu_capability(), *sorted(names))
        return Arithmetic(torch.__version__, processors, predictors.rows.block_rows)


@dataclass(frozen=True)
class Recipe:
    """All that the bytes of an output depend on.

    Attributes:
        version: of this program.
        method: its name.
        options: a value for each of its options that has one.
        bundle: digest of the bundle; None for methods that read none.
        target: what the bundle's hyper-model was taught to predict.
        steps: how many are predicted.
        rate: sampling rate from one checkpoint to the next; 0.5 where they are of no forgetting.
        trajectory: how the checkpoints came about.
        norm: see :class:`~know_cli.engine.settings.NormMode`.
        frozen: see :class:`~know_cli.engine.settings.FrozenMode`.
        overrides: kinds that the user sets.
        allow_nonfinite: whether values that are not finite are copied from Θ0.
        checkpoints: S.
        inputs: fingerprint of each checkpoint, Θ0's first; empty where an older header has none.
        device: type of the device that computes.
        kernel: which of several implementations computes there; None where there is one.
        coefficients: ``[S]``, Θ0's first, where all that is predicted is an average.
    """

    version: str
    method: str
    options: Mapping[str, Value]
    bundle: str | None
    target: str | None
    steps: int
    rate: float
    trajectory: TrajectoryKind
    norm: NormMode
    frozen: FrozenMode
    overrides: tuple[Override, ...]
    allow_nonfinite: bool
    checkpoints: int
    inputs: tuple[str, ...]
    device: str
    kernel: str | None
    coefficients: tuple[float, ...] | None = None

    @staticmethod
    def of(
        request: Request,
        trajectory: Trajectory,
        rate: float,
        bundle: HyperModelBundle | None,
        device: str,
        predictors: Predictors,
    ) -> Recipe:
        """The recipe of a request whose inputs and method are open."""
        settings = request.settings
        assert settings.norm is not None
        return Recipe(
            version=__version__,
            method=request.method,
            options=request.options,
            bundle=None if bundle is None else bundle.digest,
            target=None if bundle is None else bundle.target,
            steps=settings.steps,
            rate=rate,
            trajectory=trajectory.kind,
            norm=settings.norm,
            frozen=settings.frozen,
            overrides=settings.overrides,
            allow_nonfinite=settings.allow_nonfinite,
            checkpoints=len(trajectory),
            inputs=tuple(checkpoint.fingerprint() for checkpoint in trajectory.checkpoints),
            device=device,
            kernel=predictors.kernel,
            coefficients=predictors.coefficients,
        )

    # ------------------------------------------------------------------ the header

    def to_metadata(self, step: int) -> dict[str, str]:
        """The metadata entries of the output after a step; no times or paths, so bytes repeat."""
        metadata = {
            keys.VERSION: self.version,
            keys.METHOD: self.method,
            keys.STEPS: str(step),
            keys.TRAJECTORY_KIND: self.trajectory.value,
            keys.NORM: self.norm.value,
            keys.FROZEN: self.frozen.value,
            keys.DEVICE: self.device,
            keys.CHECKPOINTS: str(self.checkpoints),
            keys.INPUTS: " ".join(self.inputs),
        }
        if self.known_rate is not None:
            metadata[keys.RATE] = repr(self.known_rate)
        if self.options:
            metadata[keys.OPTIONS] = json.dumps(dict(self.options), sort_keys=True)
        if self.overrides:
            metadata[keys.KINDS] = json.dumps(self._kinds())
        if self.allow_nonfinite:
            metadata[keys.NONFINITE] = "copy"
        if self.kernel is not None:
            metadata[keys.KERNEL] = self.kernel
        if self.coefficients is not None:
            metadata[keys.COEFFICIENTS] = json.dumps(self.coefficients)
        if self.bundle is not None:
            metadata[keys.BUNDLE] = self.bundle
        if self.target is not None:
            metadata[keys.TARGET] = self.target
        return metadata

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Recipe:
        """The recipe that :meth:`to_metadata` wrote; ``steps`` is the output's own step.

        Raises:
            ValueError: something is missing or cannot be; says what.
        """
        try:
            # Older headers have no kind, and are all of forgettings.
            kind = TrajectoryKind(
                metadata.get(keys.TRAJECTORY_KIND, TrajectoryKind.FORGETTING.value)
            )
            is_forgetting = kind is TrajectoryKind.FORGETTING
            recipe = Recipe(
                version=metadata.get(keys.VERSION, ""),
                method=metadata[keys.METHOD],
                options=json.loads(metadata.get(keys.OPTIONS, "{}")),
                bundle=metadata.get(keys.BUNDLE),
                target=metadata.get(keys.TARGET),
                steps=int(metadata[keys.STEPS]),
                rate=float(metadata[keys.RATE]) if is_forgetting else DEFAULT_RATE,
                trajectory=kind,
                norm=NormMode(metadata[keys.NORM]),
                frozen=FrozenMode(metadata.get(keys.FROZEN, FrozenMode.COPY.value)),
                overrides=_overrides(metadata.get(keys.KINDS, "[]")),
                allow_nonfinite=keys.NONFINITE in metadata,
                checkpoints=int(metadata[keys.CHECKPOINTS]),
                inputs=tuple(metadata.get(keys.INPUTS, "").split()),
                device=metadata.get(keys.DEVICE, "cpu"),
                kernel=metadata.get(keys.KERNEL),
                coefficients=_coefficients(metadata.get(keys.COEFFICIENTS)),
            )
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if not (
            1 <= recipe.steps <= MAX_STEPS
            and keys.rate_problem(recipe.rate) is None
            and isinstance(recipe.options, dict)
        ):
            raise ValueError("a value is out of its range")
        return recipe

    # ------------------------------------------------------------------ the others

    @property
    def known_rate(self) -> float | None:
        """The sampling rate; None where checkpoints are of no forgetting."""
        return self.rate if self.trajectory is TrajectoryKind.FORGETTING else None

    @property
    def factor(self) -> str | None:
        """Factor of training data that the last step stands for, such as ``x2``, if known."""
        return None if self.known_rate is None else factor_name(self.known_rate, self.steps)

    def identity(self, arithmetic: Arithmetic) -> str:
        """A key for the numbers: the same if and only if they come out the same.

        Args:
            arithmetic: of the machine that computes them.
        """
        return json.dumps({**self.to_json(), "arithmetic": asdict(arithmetic)}, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for a JSON report."""
        optional: dict[str, Any] = {
            "bundle": self.bundle,
            "target": self.target,
            "kernel": self.kernel,
            "coefficients": self.coefficients and list(self.coefficients),
        }
        return {
            "version": self.version,
            "method": self.method,
            "options": dict(self.options),
            "steps": self.steps,
            "trajectory": self.trajectory.value,
            "rate": self.known_rate,
            "factor": self.factor,
            "norm": self.norm.value,
            "frozen": self.frozen.value,
            "overrides": self._kinds(),
            "allow_nonfinite": self.allow_nonfinite,
            "inputs": list(self.inputs),
            "device": self.device,
            **{key: value for key, value in optional.items() if value is not None},
        }

    def to_request(
        self,
        checkpoints: Sequence[Path],
        output: Path,
        *,
        weights: str | None,
        device: str | None,
        threads: int,
        max_memory: int,
    ) -> Request:
        """The request that computes the same again, to be compared with an output.

        Args:
            checkpoints: where the inputs are.
            output: what is compared with.
            weights: where the bundle is.
            device: where to compute; None is the type of device that was used.
            threads: worker threads.
            max_memory: bytes of working memory.

        Raises:
            UsageError: this version cannot follow the recipe.
        """
        return Request(
            checkpoints=checkpoints,
            output=output,
            weights=weights,
            settings=Settings(
                steps=self.steps,
                norm=self.norm,
                frozen=self.frozen,
                overrides=self.overrides,
                allow_nonfinite=self.allow_nonfinite,
                max_memory=max_memory,
                threads=threads,
            ),
            rate=self.known_rate,
            trajectory=self.trajectory,
            device=device or (self.device if self.device in ("cuda", "mps", "xpu") else "cpu"),
            kernel=self.kernel if self.kernel in KERNELS else AUTO,
            method=self.method,
            options=self.options,
            rewrite=False,
        )

    def _kinds(self) -> list[str]:
        return [f"{override.pattern}={override.kind.value}" for override in self.overrides]


def _overrides(text: str) -> tuple[Override, ...]:
    texts = json.loads(text)
    if not isinstance(texts, list):
        raise ValueError("kinds are no list")
    return tuple(parse_override(str(text)) for text in texts)


def _coefficients(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError("coefficients are no list")
    return tuple(float(number) for number in found)


def output_metadata(recipe: Recipe, trajectory: Trajectory, step: int) -> dict[str, str]:
    """All metadata of the output after a step: Θ0's own, its place in the trajectory, the recipe.

    Args:
        recipe: how it is made.
        trajectory: the inputs.
        step: after which it is written.
    """
    # transformers 4 reads no file that does not say which framework's tensors it has.
    metadata = {"format": "pt", **trajectory.first.metadata}
    for key in _SOMETIMES:
        metadata.pop(key, None)
    if recipe.trajectory is not TrajectoryKind.FORGETTING:
        for key in _OF_FORGETTINGS:
            metadata.pop(key, None)
    if recipe.trajectory is TrajectoryKind.BRANCHES:
        metadata.pop(keys.TRAINING_STEP, None)  # branches have trained on
    session = Session.from_metadata(metadata)
    if session is not None:
        # A prediction takes its place in the trajectory: the session before the first.
        metadata |= Session(
            session.index - step * trajectory.stride,
            session.fraction / recipe.rate**step,
            session.rate,
            session.trajectory,
        ).to_metadata()
    return {**metadata, **recipe.to_metadata(step)}
