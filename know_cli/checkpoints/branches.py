"""Do branches go on from one Θ0? They may have tensors of their own, and lack some of Θ0's."""

from __future__ import annotations

from collections.abc import Sequence

from know_cli.checkpoints.alignment import OnlyCopied, explain_differences, nothing
from know_cli.checkpoints.checkpoint import Checkpoint
from know_cli.checkpoints.dtypes import is_float
from know_cli.errors import CheckpointError, counted, quoted

# A branch that has less of Θ0's weights is hardly one.
_LEAST_SHARE = 0.5


def align_branches(
    checkpoints: Sequence[Checkpoint], only_copied: OnlyCopied = nothing
) -> tuple[dict[str, frozenset[int]], list[str]]:
    """Find which of Θ0's weights each branch has, in Θ0's shape.

    Fine-tunes of one model on several tasks have heads of their own, and mostly lack Θ0's.

    Args:
        checkpoints: Θ0 first.
        only_copied: tells which tensors are no weights; these are Θ0's in any case.

    Returns:
        Tensor → positions of the checkpoints that do not have it, only where there are some; and
        what is left out of account, in words for the user.

    Raises:
        CheckpointError: a branch has less than half of Θ0's weights, or one of them in an element
            type that cannot be computed with.
    """
    first = checkpoints[0]
    copied = only_copied(first)
    weights = {name: entry for name, entry in first.tensors.items() if name not in copied}
    absent: dict[str, frozenset[int]] = {}
    own: dict[str, Checkpoint] = {}
    for k, branch in enumerate(checkpoints[1:], start=1):
        shared = 0
        for name, entry in first.tensors.items():
            found = branch.tensors.get(name)
            if found is None or found.shape != entry.shape:
                absent[name] = absent.get(name, frozenset()) | {k}
                continue
            if name in copied:
                continue
            if found.dtype != entry.dtype and not (is_float(found.dtype) and is_float(entry.dtype)):
                raise CheckpointError(
                    f"{branch.path}: {quoted(name)} is {found.dtype} but {entry.dtype} in "
                    f"{first.path}; save branches in an element type that can be computed with"
                )
            shared += entry.info.elements
        _check_share(first, branch, shared, sum(e.info.elements for e in weights.values()))
        for name in branch.tensors.keys() - first.tensors.keys():
            own.setdefault(name, branch)
    notices = []
    if own:
        name = min(own)
        notices.append(
            f"{counted(len(own), 'tensor')} that {first.path} does not have {_are(len(own))} left "
            f"out, such as {quoted(name)} in {own[name].path}"
        )
    lacking = {name: absent[name] for name in sorted(absent) if name in weights}
    nowhere = [name for name, where in lacking.items() if len(where) == len(checkpoints) - 1]
    partly = [name for name in lacking if name not in nowhere]
    if partly:
        where = ", ".join(str(checkpoints[k].path) for k in sorted(lacking[partly[0]]))
        notices.append(
            f"{counted(len(partly), 'tensor')} {_are(len(partly))} not in all branches as in "
            f"{first.path}, "
            f"such as {quoted(partly[0])} (not in {where}): taken from those that have it"
        )
    if nowhere:
        notices.append(
            f"{counted(len(nowhere), 'tensor')} {_are(len(nowhere))} in no branch as in "
            f"{first.path}, such as {quoted(nowhere[0])}: copied from there"
        )
    return absent, notices


def _check_share(first: Checkpoint, branch: Checkpoint, shared: int, total: int) -> None:
    if shared and shared >= _LEAST_SHARE * total:
        return
    raise CheckpointError(
        f"{branch.path}: has only {shared} of the {total} parameters of {first.path}, from which "
        "branches go on; give Θ0 first, and branches of it" + explain_differences([first, branch])
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
