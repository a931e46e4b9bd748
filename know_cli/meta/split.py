"""Which trajectories KNOWN is fitted to, and which are held out to evaluate it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection as Names
from collections.abc import Sequence
from dataclasses import dataclass

from know_cli.errors import UsageError, counted
from know_cli.meta.settings import Settings
from know_cli.meta.windows import Collection, RecordedTrajectory

#: Groups of trajectories that are never trained on.
TRAJECTORIES, ARCHITECTURES, DATA_SETS = "trajectories", "architectures", "data sets"
REGIMES = "regimes"


@dataclass(frozen=True)
class Split:
    """A division of trajectories, as their positions in a collection.

    Attributes:
        training: those that KNOWN is fitted to.
        held_out: those that it is evaluated on, in groups, none of them empty: ``trajectories``
            of the same regimes, architectures and data sets as the training ones, then
            ``architectures``, ``data sets`` and ``regimes`` that are never trained on. A
            trajectory that belongs to several groups is in the last of them.
    """

    training: list[int]
    held_out: dict[str, list[int]]

    @property
    def all_held_out(self) -> list[int]:
        """The positions of all groups, ascending."""
        return sorted(number for group in self.held_out.values() for number in group)


def split(
    trajectories: Sequence[RecordedTrajectory],
    holdout: float,
    seed: int,
    *,
    architectures: Names[str] = (),
    data_sets: Names[str] = (),
    regimes: Names[str] = (),
) -> Split:
    """Divide trajectories into those for training and those held out.

    The draw depends on their identities, so nearly the same ones are held out when a few are
    missing.

    Args:
        trajectories: to divide.
        holdout: share of the remaining trajectories that is held out, too.
        seed: of the draw.
        architectures: names of architectures that are never trained on.
        data_sets: names of data sets that are never trained on.
        regimes: names of regimes that are never trained on.

    Raises:
        UsageError: no trajectory has such an architecture, data set or regime, or one side would
            be empty.
    """
    for what, names, present in (
        ("architecture", architectures, {one.architecture for one in trajectories}),
        ("data set", data_sets, {one.data_set for one in trajectories}),
        ("regime", regimes, {one.regime for one in trajectories}),
    ):
        for name in sorted(set(names) - present):
            found = ", ".join(sorted(present - {""})) or "none recorded"
            raise UsageError(f"cannot hold out {what} {name!r}: the trajectories have {found}")
    groups: dict[str, list[int]] = {
        TRAJECTORIES: [],
        ARCHITECTURES: [],
        DATA_SETS: [],
        REGIMES: [],
    }
    rest = []
    for number, one in enumerate(trajectories):
        if one.regime in regimes:
            groups[REGIMES].append(number)
        elif one.data_set and one.data_set in data_sets:
            groups[DATA_SETS].append(number)
        elif one.architecture and one.architecture in architectures:
            groups[ARCHITECTURES].append(number)
        else:
            rest.append(number)
    rest.sort(key=lambda number: _rank(seed, trajectories[number].identity))
    count = round(holdout * len(rest))
    if not 0 < count < len(rest):
        raise UsageError(
            f"{counted(len(rest), 'trajectory', 'trajectories')} cannot be split with a share of "
            f"{holdout:g} held out: at least one is needed on each side; record more with 'know "
            "forget' or 'know collect'"
        )
    groups[TRAJECTORIES] = sorted(rest[:count])
    held_out = {name: numbers for name, numbers in groups.items() if numbers}
    return Split(sorted(rest[count:]), held_out)


def split_collection(collection: Collection, settings: Settings) -> Split:
    """The division of a collection's trajectories that a training's settings ask for.

    Raises:
        UsageError: see :func:`split`.
    """
    return split(
        collection.trajectories,
        settings.holdout,
        settings.seed,
        architectures=settings.held_out_architectures,
        data_sets=settings.held_out_data_sets,
        regimes=settings.held_out_regimes,
    )


def _rank(seed: int, identity: str) -> str:
    return hashlib.sha256(f"{seed} {identity}".encode()).hexdigest()
