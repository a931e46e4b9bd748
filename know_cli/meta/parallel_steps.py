"""From which angle between its steps on a run's checkpoints are better not averaged.

Where successive steps point the same way the run is still on its way, and the mean of its
checkpoints is where it was in the middle of them. Collected runs tell from how parallel on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from know_cli.errors import UsageError
from know_cli.files import read_text
from know_cli.meta.run_recording import FORMAT, RUN_RECORD


@dataclass(frozen=True)
class RunCase:
    """A collected run.

    Attributes:
        parallel: mean cosine of the angle between successive steps from checkpoint to checkpoint.
        lost: whether the mean of the checkpoints has a higher test loss than the last one.
    """

    parallel: float
    lost: bool


@dataclass(frozen=True)
class ParallelThreshold:
    """The threshold that divides runs best, and how well.

    Attributes:
        value: above it averaging is warned of.
        warned: number of runs above it, and ``lost`` of these by averaging.
        others: number of runs below it, and ``others_lost`` of these.
    """

    value: float
    warned: int
    lost: int
    others: int
    others_lost: int


def read_cases(folder: Path) -> list[RunCase]:
    """The runs that ``know collect --regime run`` left in a folder, of three or more checkpoints.

    Raises:
        UsageError: a record cannot be read, or is of another version.
    """
    cases = []
    for path in sorted(folder.glob(f"*/{RUN_RECORD}")):
        try:
            facts = json.loads(read_text(path))
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']!r}")
            if facts["shape"]:
                last, average = (
                    float(facts["measured"][name]["test_loss"]) for name in ("last", "average")
                )
                cases.append(RunCase(float(facts["shape"]["parallel"]), average > last))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}: is not a run's record that this version can read "
                f"({type(error).__name__}: {error})"
            ) from error
    return cases


def at(value: float, cases: Sequence[RunCase]) -> ParallelThreshold:
    """How well a threshold divides runs."""
    warned = [case.lost for case in cases if case.parallel > value]
    others = [case.lost for case in cases if case.parallel <= value]
    return ParallelThreshold(value, len(warned), sum(warned), len(others), sum(others))


def learn(cases: Sequence[RunCase]) -> ParallelThreshold:
    """The threshold, a multiple of 0.05, that divides runs best.

    It is the one with the largest difference between the share of the losing runs that are
    warned of and the share of the others that are (Youden's J); of equal ones the highest.

    Raises:
        UsageError: all of the runs lost by averaging, or none.
    """
    losing = sum(case.lost for case in cases)
    if not 0 < losing < len(cases):
        raise UsageError(
            f"{losing} of {len(cases)} runs lost by averaging; a threshold needs runs of both sorts"
        )
    others = len(cases) - losing

    def difference(found: ParallelThreshold) -> float:
        return found.lost / losing - (found.warned - found.lost) / others

    candidates = [at(round(0.05 * k, 2), cases) for k in range(-20, 20)]
    return max(candidates, key=lambda found: (round(difference(found), 9), found.value))
