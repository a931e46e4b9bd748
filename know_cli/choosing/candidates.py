"""What is compared with Θ0: which candidates, and how each is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.methods.spelling import Spelled, parse_spelled

#: A start to compare, as ``know predict`` makes it.
Candidate = Spelled


def parse_candidate(text: str) -> Candidate:
    """Read ``METHOD,option=value,steps=2``.

    >>> parse_candidate("shrink,lambda=0.9,steps=2").steps
    2

    Raises:
        UsageError: there is no such method or option, or a value that cannot be.
    """
    return parse_spelled(text, "--candidate")


#: The word that stands for the usual candidates among others.
USUAL = "usual"

# What is worth a measure for each kind of trajectory.
_USUAL: Mapping[TrajectoryKind, tuple[str, ...]] = {
    TrajectoryKind.FORGETTING: (
        "known",
        "known,steps=2",
        "known,steps=3",
        "known,weights=retrodiction",
        "known,weights=retrodiction,steps=2",
        "known,weights=retrodiction,steps=3",
        "average",
        "average,forgotten=3",
        "shrink,lambda=0.9",
        "shrink,lambda=0.8",
        "shrink,lambda=0.6",
        "last",
        "task-vector,alpha=0.5",
        "task-vector,alpha=1",
    ),
    TrajectoryKind.RUN: (
        "average,last=2",
        "average,last=3",
        "average,last=5",
        "average",
        "average,shape=linear",
        "average,shape=sqrt",
        "average,shape=cosine",
        "average,shape=exponential",
        "shrink,lambda=0.9",
        "shrink,lambda=0.8",
        "shrink,lambda=0.6",
        "task-vector,alpha=0.5",
        "task-vector,alpha=1",
    ),
    TrajectoryKind.BRANCHES: ("average", "shrink,lambda=0.9", "shrink,lambda=0.8"),
}


_COUNT = re.compile(r"(?:last|forgotten)=(\d+)")


def choose_candidates(
    texts: Sequence[str],
    checkpoints: int,
    kind: TrajectoryKind = TrajectoryKind.FORGETTING,
) -> list[Candidate]:
    """The candidates that a command line asks for.

    Args:
        texts: of ``--candidate``; none gives the usual ones.
        checkpoints: S.
        kind: of the trajectory.

    Raises:
        UsageError: a text is wrong, or two make the same file.
    """
    usual = [text for text in _USUAL[kind] if not _averages_all(text, checkpoints)]
    expanded = [one for text in texts or (USUAL,) for one in (usual if text == USUAL else (text,))]
    found = [parse_candidate(text) for text in dict.fromkeys(expanded)]
    names = [candidate.name for candidate in found]
    for candidate in found:
        if names.count(candidate.name) > 1:
            raise UsageError(f"--candidate {candidate.text}: another one has the same name")
    return found


def _averages_all(text: str, checkpoints: int) -> bool:
    """Whether a usual candidate averages so many checkpoints that these are all, or more.

    ``average`` is all of them.
    """
    found = _COUNT.search(text)
    return found is not None and int(found[1]) >= checkpoints
