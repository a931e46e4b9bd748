"""What a prediction did, in numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from know_cli.engine.plan import Action, PlannedTensor
from know_cli.files import read_text
from know_cli.kinds import Kind
from know_cli.passes.numbers import Sums

_STATUS = Path("/proc/self/status")


@dataclass
class KindReport:
    """Sums over the tensors of one kind, for the last step.

    Attributes:
        tensors: number of tensors of the kind.
        parameters: their parameters.
        predicted: of these, how many are in tensors that were predicted.
        frozen: of these, how many are the same in all checkpoints and kept Θ0's bits.
        absolute_change: Σ |Θ̂ − Θ0| over predicted parameters.
        squared_change: Σ (Θ̂ − Θ0)².
        squared_norm: Σ Θ0² over predicted parameters.
    """

    tensors: int = 0
    parameters: int = 0
    predicted: int = 0
    frozen: int = 0
    absolute_change: float = 0.0
    squared_change: float = 0.0
    squared_norm: float = 0.0

    @property
    def mean_change(self) -> float | None:
        """Mean |Θ̂ − Θ0| of the predicted parameters."""
        return self.absolute_change / self.predicted if self.predicted else None

    @property
    def relative_change(self) -> float | None:
        """‖Θ̂ − Θ0‖ / ‖Θ0‖ over the predicted parameters."""
        if not self.predicted or self.squared_norm == 0:
            return None
        return float((self.squared_change / self.squared_norm) ** 0.5)

    @property
    def share_copied(self) -> float:
        """Share of the parameters that have Θ0's values."""
        if not self.parameters:
            return 0.0
        return 1 - (self.predicted - self.frozen) / self.parameters

    def add_changes(self, sums: Sums) -> None:
        """Take in Σ |Θ̂ − Θ0|, Σ (Θ̂ − Θ0)² and Σ Θ0² of predicted parameters.

        Args:
            sums: ``[cells, 3]``, added one after the other, so that it does not matter which of
                them come together.
        """
        for absolute, squared, norm in sums.tolist():
            self.absolute_change += absolute
            self.squared_change += squared
            self.squared_norm += norm


@dataclass
class Report:
    """The whole run.

    Attributes:
        outputs: each checkpoint written, with its step.
        digests: files written with the outputs' digests.
        kinds: sums per kind.
        reasons: for what was not predicted, reason → number of tensors.
        replaced: predictions that were not finite, or not in the output's dtype, and were
            replaced by Θ0's value (over all steps written).
        nonfinite: input values that were not finite and were copied from Θ0.
        truncations: of groups of tensors that may not hold all that was predicted, the relative
            error of what they hold, by the name of the first.
        peak_memory: the most bytes of this process that were resident at a time; None where the
            system does not tell.
        seconds: time in reading, computing and writing, of all threads together, and in total.
        notices: what the user should know.
    """

    outputs: list[tuple[Path, int]] = field(default_factory=list)
    digests: list[Path] = field(default_factory=list)
    kinds: dict[Kind, KindReport] = field(
        default_factory=lambda: {kind: KindReport() for kind in Kind}
    )
    reasons: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    nonfinite: int = 0
    truncations: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    peak_memory: int | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: {"reading": 0.0, "computing": 0.0, "writing": 0.0, "total": 0.0}
    )
    notices: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @staticmethod
    def of(tensors: Iterable[PlannedTensor]) -> Report:
        """A report that has counted the tensors of a plan, before anything has happened."""
        report = Report()
        for tensor in tensors:
            numbers = report.kinds[tensor.kind]
            numbers.tensors += 1
            numbers.parameters += tensor.elements
            if tensor.action is Action.PREDICT:
                numbers.predicted += tensor.elements
            else:
                key = f"{tensor.action.value}: {tensor.reason}"
                report.reasons[key] = report.reasons.get(key, 0) + 1
        return report

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that the block takes to one of the seconds, in any thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self.seconds[what] += took

    def share_to_json(self) -> dict[str, Any]:
        """What a rank has done, for :meth:`join`."""
        return {
            "changes": {
                kind.value: (n.absolute_change, n.squared_change, n.squared_norm, n.frozen)
                for kind, n in self.kinds.items()
            },
            "replaced": self.replaced,
            "nonfinite": self.nonfinite,
            "truncations": self.truncations,
            "seconds": self.seconds,
        }

    def join(self, part: Mapping[str, Any]) -> None:
        """Take in what the next rank has done."""
        for kind, (absolute, squared, norm, frozen) in part["changes"].items():
            numbers = self.kinds[Kind(kind)]
            numbers.absolute_change += absolute
            numbers.squared_change += squared
            numbers.squared_norm += norm
            numbers.frozen += frozen
        self.replaced += part["replaced"]
        self.nonfinite += part["nonfinite"]
        self.truncations |= part["truncations"]
        for what, seconds in part["seconds"].items():
            # Ranks work at the same time.
            self.seconds[what] = max(self.seconds[what], seconds)

    @property
    def predicted(self) -> int:
        """Parameters predicted, all kinds together."""
        return sum(kind.predicted for kind in self.kinds.values())

    @property
    def frozen(self) -> int:
        """Elements of predicted tensors that kept Θ0's bits, all kinds together."""
        return sum(kind.frozen for kind in self.kinds.values())

    def _truncations_to_json(self) -> dict[str, Any]:
        errors = self.truncations.values()
        largest = max(self.truncations, key=lambda name: self.truncations[name], default=None)
        return {
            "groups": len(errors),
            "mean": sum(errors) / len(errors) if errors else None,
            "largest": max(errors, default=None),
            "largest_of": largest,
            "of": self.truncations,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {
            "outputs": [{"path": str(path), "step": step} for path, step in self.outputs],
            "digests": [str(path) for path in self.digests],
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "kinds": {
                kind.value: {
                    **asdict(numbers),
                    "mean_change": numbers.mean_change,
                    "relative_change": numbers.relative_change,
                    "share_copied": numbers.share_copied,
                }
                for kind, numbers in self.kinds.items()
                if numbers.tensors
            },
            "not_predicted": self.reasons,
            "frozen_elements": self.frozen,
            "replaced": self.replaced,
            "nonfinite": self.nonfinite,
            "truncations": self._truncations_to_json(),
            "seconds": self.seconds,
            "notices": self.notices,
        }


def peak_resident() -> int | None:
    """The most bytes that were resident at a time since the start, mapped files and code counted.

    Returns:
        None where the system does not tell.
    """
    try:
        # What getrusage tells on Linux begins with the peak of the process that started this one.
        for line in read_text(_STATUS).splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
