"""Running totals of a collection of trajectories, by architecture."""

from __future__ import annotations

from dataclasses import dataclass, field

from know_cli.kinds import Kind
from know_cli.meta.collecting import Collected
from know_cli.meta.windows import is_data_limited


@dataclass
class Line:
    """Sums over the trajectories of one architecture.

    Attributes:
        trajectories: number of them.
        data_limited: how many are data-limited; see
            :func:`~know_cli.meta.windows.is_data_limited`.
        rows: sampled parameters of each kind.
        accuracy: summed test accuracies: of Θ0 (``full``), of the most-forgotten session
            (``last``), and where it was, of Θ0 trained longer (``longer``) and on 1/r times its
            data (``continued``).
    """

    trajectories: int = 0
    data_limited: int = 0
    rows: dict[Kind, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    def add(self, one: Collected) -> None:
        """Count a trajectory."""
        recorded = one.facts["recorded"]
        self.trajectories += 1
        self.data_limited += bool(is_data_limited(dict(one.facts)))
        for kind, rows in one.rows.items():
            self.rows[kind] = self.rows.get(kind, 0) + rows
        measured = {index: entry["measurements"] for index, entry in recorded.items()}
        last = str(one.facts["sessions"] - 1)
        found = {
            "full": measured["0"]["test_accuracy"],
            "last": measured[last]["test_accuracy"],
        }
        if "-1" in measured:
            found["longer"] = measured["0"]["longer_test_accuracy"]
            found["continued"] = measured["-1"]["test_accuracy"]
        for name, value in found.items():
            self.accuracy[name] = self.accuracy.get(name, 0.0) + value

    def mean(self, name: str) -> float | None:
        """Mean test accuracy, 0 to 1; None where it is not measured."""
        return self.accuracy[name] / self.trajectories if name in self.accuracy else None


@dataclass
class Totals:
    """Sums over a shard.

    Attributes:
        wanted: number of trajectories of the complete shard.
        lines: sums by architecture.
        left_out: number of trajectories that could not be used.
        seconds: time spent on those collected in this run, summed over processes.
        timed: number of trajectories that this time is for.
    """

    wanted: int
    lines: dict[str, Line] = field(default_factory=dict)
    left_out: int = 0
    seconds: float = 0.0
    timed: int = 0

    @property
    def done(self) -> int:
        """Number of trajectories collected or left out."""
        return self.left_out + sum(line.trajectories for line in self.lines.values())

    @property
    def rows(self) -> dict[Kind, int]:
        """Sampled parameters of each kind."""
        found: dict[Kind, int] = {}
        for line in self.lines.values():
            for kind, rows in line.rows.items():
                found[kind] = found.get(kind, 0) + rows
        return found

    def add(self, one: Collected) -> None:
        """Count a trajectory."""
        if one.seconds is not None:
            self.seconds += one.seconds
            self.timed += 1
        if one.reason:
            self.left_out += 1
        else:
            architecture = one.facts["setup"]["design"]["architecture"]
            self.lines.setdefault(architecture, Line()).add(one)

    def seconds_left(self, processes: int) -> float | None:
        """Estimated seconds until the shard is complete; None before anything is measured."""
        if not self.timed:
            return None
        return (self.wanted - self.done) * self.seconds / self.timed / processes
