"""The keys that this program uses in the metadata of safetensors files.

All values are strings, as the format requires. ``know forget`` writes a :class:`Session`;
``know-predict`` reads it from its inputs and adds provenance to its output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from know_cli.errors import quoted

SESSION = "know.session"
FRACTION = "know.fraction"
RATE = "know.rate"
TRAJECTORY = "know.trajectory"
REGIME = "know.regime"
CONTINUATION = "know.continuation"
TRAJECTORY_KIND = "know.trajectory-kind"
TRAINING_STEP = "know.training-step"
BRANCH = "know.branch"
SEED = "know.seed"

VERSION = "know.version"
METHOD = "know.method"
OPTIONS = "know.options"
STEPS = "know.steps"
CHECKPOINTS = "know.checkpoints"
BUNDLE = "know.bundle"
TARGET = "know.target"
NORM = "know.norm"
FROZEN = "know.frozen"
KINDS = "know.kinds"
NONFINITE = "know.nonfinite"
DEVICE = "know.device"
KERNEL = "know.kernel"
INPUTS = "know.inputs"
CHOSEN = "know.chosen"
COEFFICIENTS = "know.coefficients"


# No forgetting keeps less of the data from one checkpoint to the next, and none has more
# sessions: numbers beyond come from damaged or forged metadata, and would overflow what is
# computed of them.
_SMALLEST_RATE = 1e-6
_LARGEST_INDEX = 1000
_LARGEST_FRACTION = 1e100


def rate_problem(rate: float) -> str | None:
    """What is wrong with a sampling rate that was read or computed; None where nothing is."""
    if _SMALLEST_RATE <= rate < 1:
        return None
    return f"a sampling rate of {rate:.3g}, which is not between {_SMALLEST_RATE:g} and 1"


class TrajectoryKind(str, Enum):
    """How several checkpoints of one model came about; the values of :data:`TRAJECTORY_KIND`.

    ``FORGETTING``: Θ0, then fine-tuned on ever smaller nested subsets (the paper).
    ``RUN``: one ordinary training run; Θ0 is its latest checkpoint, the others come before it.
    ``BRANCHES``: several trainings that go on from one Θ0.
    """

    FORGETTING = "forgetting"
    RUN = "run"
    BRANCHES = "branches"

    @property
    def text(self) -> str:
        """What checkpoints are of, in words that follow "of": ``a run``."""
        return self.value if self is TrajectoryKind.BRANCHES else f"a {self.value}"

    @property
    def plural(self) -> str:
        """Several of them: ``runs``."""
        return self.value if self is TrajectoryKind.BRANCHES else f"{self.value}s"

    @property
    def unit(self) -> str:
        """One of them as what is counted: ``run``."""
        return "set of branches" if self is TrajectoryKind.BRANCHES else self.value

    @property
    def units(self) -> str:
        """Several of them, counted: ``runs``."""
        return "sets of branches" if self is TrajectoryKind.BRANCHES else f"{self.value}s"

    def counted(self, number: int) -> str:
        """So many of them.

        >>> TrajectoryKind.BRANCHES.counted(1), TrajectoryKind.RUN.counted(2)
        ('1 set of branches', '2 runs')
        """
        return f"{number:,} {self.unit if number == 1 else self.units}"

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> TrajectoryKind | None:
        """The kind of trajectory that one checkpoint was recorded in; None if it does not tell.

        >>> TrajectoryKind.from_metadata({"know.trajectory-kind": "run"})
        <TrajectoryKind.RUN: 'run'>
        """
        found = metadata.get(TRAJECTORY_KIND)
        if found in [kind.value for kind in TrajectoryKind]:
            return TrajectoryKind(found)
        recorded = Session.from_metadata(metadata) or Continuation.from_metadata(metadata)
        return None if recorded is None else TrajectoryKind.FORGETTING


class Regime(str, Enum):
    """What a session of structured forgetting starts from; the values of :data:`REGIME`.

    ``CHAIN``: the session before (the paper's text). ``COMMON_START``: the same weights for all
    sessions (the authors' sample script).
    """

    CHAIN = "chain"
    COMMON_START = "common-start"


@dataclass(frozen=True)
class Session:
    """Which session of a structured forgetting a checkpoint was recorded in.

    Attributes:
        index: 0 for the full data, then 1, 2, …; a prediction has −1, −2, …
        fraction: its share of session 0's data, ``rate ** index``.
        rate: sampling rate from one session to the next.
        trajectory: identifies the run; the same in all its checkpoints.

    >>> Session.from_metadata(Session(1, 0.5, 0.5, "run").to_metadata())
    Session(index=1, fraction=0.5, rate=0.5, trajectory='run')
    """

    index: int
    fraction: float
    rate: float
    trajectory: str

    def to_metadata(self) -> dict[str, str]:
        """The metadata entries that :meth:`from_metadata` reads back."""
        return {
            SESSION: str(self.index),
            FRACTION: repr(self.fraction),
            RATE: repr(self.rate),
            TRAJECTORY: self.trajectory,
        }

    @property
    def problem(self) -> str | None:
        """What of it cannot be, in words that follow "tells of"; None where nothing is wrong."""
        if abs(self.index) > _LARGEST_INDEX:
            return f"session {quoted(self.index)}, of which there are at most {_LARGEST_INDEX}"
        if not 1 / _LARGEST_FRACTION < self.fraction < _LARGEST_FRACTION:
            return f"a share of {self.fraction:.3g} of the data"
        return rate_problem(self.rate)

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Session | None:
        """Read the session from a checkpoint's metadata; None if there is none.

        Impossible metadata, such as a rate that is not between 0 and 1, counts as none.
        """
        try:
            session = Session(
                int(metadata[SESSION]),
                float(metadata[FRACTION]),
                float(metadata[RATE]),
                metadata[TRAJECTORY],
            )
        except (KeyError, ValueError):
            return None
        return session if 0 < session.rate < 1 and 0 < session.fraction < math.inf else None


@dataclass(frozen=True)
class Branch:
    """Which of several trainings from one Θ0 a checkpoint was recorded in.

    Attributes:
        index: 0 for Θ0, then 1, 2, …
        fraction: share of the data that it was trained on; 1.0 is all, in an order of its own.
        seed: of its training and of its subset.
        trajectory: identifies the recording; the same in all its checkpoints.

    >>> Branch.from_metadata(Branch(2, 0.5, 7, "run").to_metadata())
    Branch(index=2, fraction=0.5, seed=7, trajectory='run')
    """

    index: int
    fraction: float
    seed: int
    trajectory: str

    def to_metadata(self) -> dict[str, str]:
        """The metadata entries that :meth:`from_metadata` reads back."""
        return {
            TRAJECTORY_KIND: TrajectoryKind.BRANCHES.value,
            BRANCH: str(self.index),
            FRACTION: repr(self.fraction),
            SEED: str(self.seed),
            TRAJECTORY: self.trajectory,
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Branch | None:
        """Read the branch from a checkpoint's metadata; None if there is none that can be."""
        try:
            branch = Branch(
                int(metadata[BRANCH]),
                float(metadata[FRACTION]),
                int(metadata[SEED]),
                metadata[TRAJECTORY],
            )
        except (KeyError, ValueError):
            return None
        return branch if 0 <= branch.index <= _LARGEST_INDEX else None


@dataclass(frozen=True)
class Continuation:
    """Marks Θ0 trained further on more data than session 0 had, which is no session of the chain.

    Its metadata has no session index, so :meth:`Session.from_metadata` finds none.

    Attributes:
        step: 1 for D(−1), the next larger data set, 2 for D(−2), …
        fraction: its share of session 0's data, ``rate ** -step``, more than 1.
        rate: sampling rate from one data set to the next.
        trajectory: identifies the run; the same in all its checkpoints.
    """

    step: int
    fraction: float
    rate: float
    trajectory: str

    def to_metadata(self) -> dict[str, str]:
        """The metadata entries that :meth:`from_metadata` reads back."""
        return {
            CONTINUATION: str(self.step),
            FRACTION: repr(self.fraction),
            RATE: repr(self.rate),
            TRAJECTORY: self.trajectory,
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Continuation | None:
        """Read the continuation from a checkpoint's metadata; None if there is none."""
        try:
            return Continuation(
                int(metadata[CONTINUATION]),
                float(metadata[FRACTION]),
                float(metadata[RATE]),
                metadata[TRAJECTORY],
            )
        except (KeyError, ValueError):
            return None
