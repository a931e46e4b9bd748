"""What a hyper-model gains on trajectories that it was not taught on, beside all averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.lab.averaging import combine
from know_cli.meta.network_data import NetworkRun, State, Window, outputs
from know_cli.meta.network_models import NetworkModel

NAIVE, LAST, BRANCH = "naive", "last", "branch"
#: What others are compared with: the newest checkpoint of a run, Θ0 of a forgetting or branches.
_BASES = {
    TrajectoryKind.RUN: LAST,
    TrajectoryKind.FORGETTING: NAIVE,
    TrajectoryKind.BRANCHES: NAIVE,
}
_ROWS = 500
#: Unseen samples that are measured on at most.
_MOST = 1000
#: Two-sided 95 % points of Student's distribution by degrees of freedom, and the normal one's.
_STUDENT = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
    2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04,
)  # fmt: skip
_NORMAL = 1.959964


@dataclass(frozen=True)
class Measured:
    """Cross entropy in nats, and accuracy in per cent."""

    loss: float
    accuracy: float

    @staticmethod
    def mean(found: Sequence[Measured]) -> Measured:
        """That of several networks, measured one by one."""
        count = len(found)
        return Measured(
            math.fsum(one.loss for one in found) / count,
            math.fsum(one.accuracy for one in found) / count,
        )


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its 95 % interval (Student's), over runs."""

    mean: float
    half: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """That of one value per run; the half width of a single one is infinite."""
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return Interval(mean, math.inf)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
        return Interval(mean, _student(count - 1) * deviation / math.sqrt(count))


def _student(freedom: int) -> float:
    """The two-sided 95 % point of Student's distribution, without scipy."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # With some tens of runs the normal one alone would be up to 4 % too small (Fisher's expansion).
    z = _NORMAL
    first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    return z + first / (4 * freedom) + second / (96 * freedom**2)


def averages(checkpoints: int) -> dict[str, list[float]]:
    """The averages of a window of S to compare with: coefficients ``[S]`` by name, oldest first."""
    found = {}
    for count in sorted({2, 3, 5, checkpoints}):
        if count <= checkpoints:
            found[f"average-{count}"] = [0.0] * (checkpoints - count) + [1 / count] * count
    decays = [0.5 ** (2 * (checkpoints - 1 - k) / (checkpoints - 1)) for k in range(checkpoints)]
    found[f"average-{checkpoints}-ema"] = [decay / sum(decays) for decay in decays]
    falling = [0.5, *[1.0] * (checkpoints - 2), 0.5]
    found[f"average-{checkpoints}-linear"] = [one / sum(falling) for one in falling]
    return found


def forgotten(checkpoints: int) -> dict[str, list[float]]:
    """What else to compare with in a forgetting of S, whose last sessions are trained longest.

    Returns:
        Coefficients ``[S]`` by name, the most forgotten checkpoint first: of it alone, and of the
        means of the two and the three most forgotten ones.
    """
    counts = [count for count in (1, 2, 3) if count < checkpoints]
    return {
        LAST if count == 1 else f"average-forgotten-{count}": [1 / count] * count
        + [0.0] * (checkpoints - count)
        for count in counts
    }


def of_branches(checkpoints: int) -> dict[str, list[float]]:
    """The average of a window of branches: coefficients ``[S]`` by its name, Θ0's last."""
    branches = checkpoints - 1
    return {f"average-{branches}": [1 / branches] * branches + [0.0]}


def windows_of(run: NetworkRun, checkpoints: int) -> list[Window]:
    """The windows that are measured."""
    return [run.window(checkpoints, *choice) for choice in run.measured(checkpoints)]


_OTHERS: Mapping[TrajectoryKind, Callable[[int], dict[str, list[float]]]] = {
    TrajectoryKind.RUN: averages,
    TrajectoryKind.FORGETTING: lambda checkpoints: forgotten(checkpoints) | averages(checkpoints),
    TrajectoryKind.BRANCHES: of_branches,
}


@torch.inference_mode()
def measure(run: NetworkRun, state: Mapping[str, Tensor]) -> Measured:
    """What a network says of the unseen samples with other weights."""
    inputs, labels = run.inputs[:_MOST], run.labels[:_MOST]
    # Equal parts: what normalises by the batch needs several samples, and as many each time.
    parts = torch.tensor_split(inputs, math.ceil(len(inputs) / _ROWS))
    found = torch.cat([outputs(run, state, part) for part in parts])
    loss = float(nn.functional.cross_entropy(found, labels))
    return Measured(loss, 100 * float((found.argmax(1) == labels).float().mean()))


class HeldOut:
    """Runs to measure on, with what does not depend on the hyper-model measured once.

    Args:
        runs: none of which it is taught on.
        checkpoints: S.
    """

    def __init__(self, runs: Sequence[NetworkRun], checkpoints: int) -> None:
        self._runs, self._checkpoints = list(runs), checkpoints
        self._fixed = [self._measure_fixed(run) for run in self._runs]

    def __len__(self) -> int:
        return len(self._runs)

    def _measure_fixed(self, run: NetworkRun) -> list[dict[str, Measured]]:
        of_run = {_BASES[run.trajectory]: measure(run, run.states[-1])}
        if run.trajectory is TrajectoryKind.BRANCHES:
            of_run[BRANCH] = Measured.mean([measure(run, state) for state in run.states[:-1]])
        of_run |= {name: measure(run, state) for name, state in run.ends.items()}
        others = _OTHERS[run.trajectory](self._checkpoints)
        found = []
        for window in windows_of(run, self._checkpoints):
            means = {
                name: measure(run, combine(window.states, numbers))
                for name, numbers in others.items()
            }
            found.append({**of_run, **means})
        return found

    @torch.no_grad()
    def measured(self, model: NetworkModel) -> list[dict[str, Any]]:
        """One entry per run and window: its name, architecture, data set, and all measures."""
        found = []
        for run, fixed in zip(self._runs, self._fixed, strict=True):
            for window, others in zip(windows_of(run, self._checkpoints), fixed, strict=True):
                taught = {}
                for step in range(1, model.steps + 1):
                    weights = model.predicted(window, step)
                    state: State = {**window.states[-1], **weights}
                    taught[step_name(model.name, step)] = measure(run, state)
                found.append(
                    {
                        "run": run.name,
                        "architecture": run.setup.design.architecture,
                        "data_set": run.setup.data_set,
                        "measured": {**others, **taught},
                    }
                )
        return found


def step_name(name: str, step: int) -> str:
    """What a step of a hyper-model's prediction is called in tables.

    >>> step_name("known", 1), step_name("known", 3)
    ('known', 'known-step-3')
    """
    return name if step == 1 else f"{name}-step-{step}"


@dataclass(frozen=True)
class Gains:
    """Gains over the newest checkpoint, and of the taught one over the others; means over runs.

    Attributes:
        runs: their number.
        taught: name of the taught one.
        accuracy, loss: by name, points and nats that it is better than the newest checkpoint,
            which is the first of them.
        ahead, ahead_loss: by name, points and nats that the taught one is better than it.
    """

    runs: int
    taught: str
    accuracy: dict[str, Interval]
    loss: dict[str, Interval]
    ahead: dict[str, Interval]
    ahead_loss: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        tables = {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "ahead": self.ahead,
            "ahead_loss": self.ahead_loss,
        }
        return {"runs": self.runs} | {
            title: {
                name: [round(of.mean, 4), round(of.half, 4) if math.isfinite(of.half) else None]
                for name, of in table.items()
            }
            for title, table in tables.items()
        }


def gains(found: Sequence[Mapping[str, Any]], taught: str) -> Gains:
    """Compare what was measured, run by run; windows of a run count as one.

    Args:
        taught: name of the taught one.
        found: what :meth:`HeldOut.measured` returned, or a part of it; not empty.
    """
    runs: dict[str, list[Mapping[str, Measured]]] = {}
    for entry in found:
        runs.setdefault(entry["run"], []).append(entry["measured"])
    names = list(next(iter(runs.values()))[0])
    base = names[0]

    def over(first: str, second: str, accuracy: bool) -> Interval:
        def better(one: Mapping[str, Measured]) -> float:
            if accuracy:
                return one[first].accuracy - one[second].accuracy
            return one[second].loss - one[first].loss

        return Interval.of([sum(map(better, parts)) / len(parts) for parts in runs.values()])

    others = [name for name in names if name != taught]
    return Gains(
        len(runs),
        taught,
        {name: over(name, base, True) for name in names},
        {name: over(name, base, False) for name in names},
        {name: over(taught, name, True) for name in others},
        {name: over(taught, name, False) for name in others},
    )
