"""What kind of trajectory checkpoints are of, and the order of runs and branches.

The order of forgettings, by recorded sessions, is in :mod:`know_cli.checkpoints.trajectory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.metadata import Branch, TrajectoryKind
from know_cli.checkpoints.training_step import (
    TRAINER_STATE,
    has_trainer_state,
    names_show_steps,
    rate_left,
    training_steps,
)
from know_cli.errors import CheckpointError

OPTION = "--trajectory"
# Averages were measured where the rate falls to 0; a trainer logs it now and then only, so that the
# last one that it logged is higher.
_FALLEN = 0.05


def recorded_kind(
    checkpoints: Sequence[tuple[Path, Mapping[str, str]]],
) -> TrajectoryKind | None:
    """The kind of trajectory that the metadata of checkpoints tell; None if they do not.

    All of a run have to tell it. Of branches, one may have other metadata: Θ0, which can come from
    anywhere, unless another one is recorded as Θ0.

    Args:
        checkpoints: path and metadata of each.

    Raises:
        CheckpointError: they contradict each other.
    """
    kinds = [_kind(metadata) for _, metadata in checkpoints]
    others = [kind for kind in kinds if kind is not TrajectoryKind.BRANCHES]
    has_start = any(_index(Branch.from_metadata(metadata)) == 0 for _, metadata in checkpoints)
    if len(others) <= 1 < len(kinds) and not (has_start and any(others)):
        return TrajectoryKind.BRANCHES
    told = {kind for kind in kinds if kind is not None}
    if len(told) > 1:
        one = next(k for k, kind in enumerate(kinds) if kind is not None)
        two = next(k for k, kind in enumerate(kinds) if kind not in (None, kinds[one]))
        first, second = (kind.text for kind in (kinds[one], kinds[two]) if kind is not None)
        raise CheckpointError(
            f"{checkpoints[two][0]}: is recorded as of {second}, and {checkpoints[one][0]} as of "
            f"{first}; give checkpoints of one trajectory, or say with {OPTION} what they are"
        )
    if told == {TrajectoryKind.FORGETTING} or (told and None not in kinds):
        return told.pop()
    return None


def _kind(metadata: Mapping[str, str]) -> TrajectoryKind | None:
    """The kind that one checkpoint tells; what was made of branches is itself none."""
    kind = TrajectoryKind.from_metadata(metadata)
    if kind is TrajectoryKind.BRANCHES and Branch.from_metadata(metadata) is None:
        return None
    return kind


def kind_notices(
    checkpoints: Sequence[Checkpoint],
    wanted: TrajectoryKind | None,
    recorded: TrajectoryKind | None,
) -> list[str]:
    """A line if checkpoints look as if they were of another kind than they are read as.

    Args:
        checkpoints: as they were given.
        wanted: what the user says; None if nothing.
        recorded: what their metadata say; None if nothing.
    """
    if wanted is not None:
        kinds = [_kind(checkpoint.metadata) for checkpoint in checkpoints]
        # The Θ0 of branches may come from anywhere.
        is_start = wanted is TrajectoryKind.BRANCHES and kinds.count(recorded) == 1
        if recorded in (None, wanted) or is_start:
            return []
        return [
            f"warning: {OPTION} {wanted.value}, but the checkpoints are recorded as of "
            f"{recorded.text}"
        ]
    if recorded is not None:
        return []
    paths = [checkpoint.path for checkpoint in checkpoints]
    if len(paths) == 1:  # of which nothing is taken for anything
        return []
    names = names_show_steps(paths)
    if not names and not all(map(has_trainer_state, paths)):
        return []
    what = "names" if names else "trainer states"
    return [
        f"warning: the checkpoints' {what} look like those of one training run; they are taken for "
        f"a forgetting, full data first: if they are of a run, add {OPTION} run"
    ]


def order_run(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Put the checkpoints of a run in order, the latest first; (ordered, notices).

    Raises:
        CheckpointError: two are of the same training step.
    """
    steps = training_steps([(each.path, each.metadata) for each in checkpoints])
    if steps is None:
        return list(checkpoints), [
            "warning: nothing tells the training steps of the checkpoints; they are taken as they "
            "were given, the latest first"
        ]
    in_order = sorted(steps, reverse=True)
    if len(set(steps)) < len(steps):
        twice = next(step for step in in_order if steps.count(step) > 1)
        names = ", ".join(
            str(each.path) for step, each in zip(steps, checkpoints, strict=True) if step == twice
        )
        raise CheckpointError(
            f"{names}: are of the same training step {twice}; give checkpoints of one run, one a "
            "step"
        )
    ordered = [checkpoints[steps.index(step)] for step in in_order]
    if steps == in_order:
        return ordered, []
    return ordered, [
        f"checkpoints were given by training steps {_listing(steps)}; put right to the latest "
        f"first: {_listing(in_order)}"
    ]


def rate_notices(latest: Checkpoint) -> list[str]:
    """A line if the learning rate of a run had all but fallen to 0 at its latest checkpoint."""
    left = rate_left(latest.path)
    if left is None or left > _FALLEN:
        return []
    return [
        f"warning: {latest.path}: the learning rate had fallen to {left:.1%} of its highest "
        f"({TRAINER_STATE}); where it falls to 0, averages gained nothing over the latest "
        "checkpoint in what was measured, and those of checkpoints that are far apart lost: "
        "measure both"
    ]


def order_branches(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Put Θ0 first and branches in their recorded order; (ordered, notices).

    Without metadata the first one is Θ0.

    Raises:
        CheckpointError: two are recorded as the same branch, or branches are given without the Θ0
            that they go on from.
    """
    branches = [Branch.from_metadata(checkpoint.metadata) for checkpoint in checkpoints]
    recorded = [k for k, branch in enumerate(branches) if branch is not None]
    if not recorded:
        return list(checkpoints), []
    for place, k in enumerate(recorded):
        for other in recorded[:place]:
            if branches[k] == branches[other]:
                raise CheckpointError(
                    f"{checkpoints[other].path}, {checkpoints[k].path}: are recorded as the same "
                    "branch; give one checkpoint a branch"
                )
    starts = [k for k in recorded if _index(branches[k]) == 0]
    others = [k for k, branch in enumerate(branches) if branch is None]
    possible = starts or others
    if len(starts) > 1:
        raise CheckpointError(
            f"{checkpoints[starts[0]].path}, {checkpoints[starts[1]].path}: are both recorded as "
            "Θ0, from which branches go on; give one, first"
        )
    if 0 not in (*starts, *others) and len(possible) != 1:
        raise CheckpointError(
            f"{checkpoints[0].path}: is recorded as a branch, and nothing tells which checkpoint "
            "is Θ0, from which all go on; give that one first"
        )
    start = possible[0] if starts or 0 not in others else 0
    order = [start]
    rest = [k for k in range(len(checkpoints)) if k != start]
    if all(branches[k] is not None for k in rest):
        rest.sort(key=lambda k: (_identity(branches[k]), _index(branches[k])))
    order += rest
    notices = []
    if order != list(range(len(checkpoints))):
        notices.append(
            "checkpoints were put in the order of the branches, Θ0 first: "
            + ", ".join(str(checkpoints[k].path) for k in order)
        )
    if len({_identity(branches[k]) for k in recorded}) > 1:
        notices.append(
            "warning: the branches are from several recordings; they can only be fused if all go "
            "on from the same Θ0"
        )
    return [checkpoints[k] for k in order], notices


def _index(branch: Branch | None) -> int:
    return -1 if branch is None else branch.index


def _identity(branch: Branch | None) -> str:
    return "" if branch is None else branch.trajectory


def _listing(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
