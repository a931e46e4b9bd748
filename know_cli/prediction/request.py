"""What a user asks for, checked as far as it can be without reading a checkpoint; free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from know_cli.checkpoints.metadata import TrajectoryKind, rate_problem
from know_cli.checkpoints.paths import check_count
from know_cli.engine.devices import check_device_name
from know_cli.engine.settings import MAX_STEPS, NormMode, Settings
from know_cli.errors import UsageError
from know_cli.known.kernels import AUTO, check_kernel_name
from know_cli.methods.bundles import check_weights
from know_cli.methods.registry import (
    DEFAULT_METHOD,
    Method,
    Value,
    check_suited,
    complete_options,
    find_method,
)

DEFAULT_RATE = 0.5


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        checkpoints: Θ0 (full data) first, most-forgotten last; of a run in any order, if they tell
            their training steps; of branches Θ0 first.
        output: file or folder to write, as Θ0 is one or the other.
        weights: name of a shipped family of the method's hyper-model, or a path. None is its
            default, and the only choice for methods that read no bundle.
        settings: steps, normalisation and so on; where it does not say what happens to
            normalisation layers, what the method does by default is put in.
        rate: sampling rate of the forgetting; None takes the checkpoints' own, else 0.5.
        every_step: also write each intermediate step.
        also: where to write some of the intermediate steps, by step.
        device: for methods with a hyper-model, one of those that
            :func:`~know_cli.engine.devices.choose_devices` knows; the others compute on the CPU.
        kernel: which implementation runs KNOWN; see :data:`~know_cli.known.kernels.KERNELS`.
        force: replace existing outputs.
        method: name of a method; see :data:`~know_cli.methods.registry.METHODS`.
        options: values for some of the method's options; the others get their defaults.
        resume: keep a journal beside the output until it is complete, and go on from the one
            that is there, if it is of the same inputs and options.
        checksum: also write each output's digest; see :mod:`know_cli.checkpoints.checksum`.
        rewrite: whether the output is to be written; if not, it is one that exists and is only
            compared with.
        names_folder: whether the output was given as a folder's name, with a slash at its end.
        trajectory: how the checkpoints came about; None takes what they tell, else a forgetting.

    Raises:
        UsageError: options that cannot be followed, whatever the checkpoints are.

    >>> request = Request([Path("ckpt0"), Path("ckpt1")], Path("out"), method="shrink")
    >>> request.options
    {'lambda': 0.97, 'of': 'weights'}
    """

    checkpoints: Sequence[Path]
    output: Path
    weights: str | None = None
    settings: Settings = field(default_factory=Settings)
    rate: float | None = None
    every_step: bool = False
    also: Mapping[int, Path] = field(default_factory=dict)
    device: str = "auto"
    force: bool = False
    method: str = DEFAULT_METHOD
    options: Mapping[str, Value] = field(default_factory=dict)
    resume: bool = False
    checksum: bool = False
    rewrite: bool = True
    names_folder: bool = False
    trajectory: TrajectoryKind | None = None
    kernel: str = AUTO

    def __post_init__(self) -> None:
        method = find_method(self.method)
        check_count(self.checkpoints, self.trajectory, method.fewest, "--method shrink takes one")
        check_device_name(self.device)
        check_kernel_name(self.kernel)
        # Complete from here on, so that nobody has to ask for defaults again.
        object.__setattr__(self, "options", complete_options(method, self.options))
        check_weights(method, self.weights)
        settings = self.settings
        if settings.norm is None:
            object.__setattr__(self, "settings", replace(settings, norm=method.norm))
        elif settings.norm is NormMode.AVERAGE and method.norm is not NormMode.AVERAGE:
            raise UsageError(
                f"--norm average: --method {method.name} takes no average; leave it out, or take "
                "--method average"
            )
        if not 1 <= settings.steps <= MAX_STEPS:
            raise UsageError(f"--steps {settings.steps}: is not in the range 1 to {MAX_STEPS}")
        if self.trajectory is not None:
            check_suited(method, self.trajectory, self.weights)
        for step in self.also:
            if not 1 <= step < self.settings.steps:
                raise UsageError(f"step {step}: is none before the last, {self.settings.steps}")
        if self.rate is not None and rate_problem(self.rate) is not None:
            raise UsageError(f"--rate {self.rate}: must be between 0 and 1, such as 0.5 or 1/3")

    @property
    def chosen(self) -> Method:
        """The method's line in the registry."""
        return find_method(self.method)
