"""Are checkpoints of one model? What has to fit, what need not, and what looks odd in headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set

from know_cli.checkpoints.checkpoint import Checkpoint, TensorEntry
from know_cli.checkpoints.dtypes import is_float
from know_cli.errors import CheckpointError, counted, quoted, quoted_first

#: Tells the names of a checkpoint's tensors that are no weights; their kinds are known above here.
OnlyCopied = Callable[[Checkpoint], Set[str]]

_MAX_DIFFERENCES = 10
#: Parts of names that a wrapper around a module or a model adds.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)


def nothing(checkpoint: Checkpoint) -> frozenset[str]:
    """Takes every tensor for a weight."""
    return frozenset()


def check_same_model(
    checkpoints: Sequence[Checkpoint], only_copied: OnlyCopied = nothing
) -> list[str]:
    """Refuse checkpoints whose names, shapes or computability differ from the first one's.

    What is only copied has to fit nothing but the first checkpoint, which it is copied from.

    Args:
        checkpoints: the first is Θ0.
        only_copied: tells which tensors are no weights.

    Returns:
        What is left out of account, in words for the user.

    Raises:
        CheckpointError: they differ; up to ten differences are listed.
    """
    first = checkpoints[0]
    differences: list[tuple[str, str]] = []
    ignored: list[tuple[str, str]] = []
    copied: Set[str] | None = None
    for other in checkpoints[1:]:
        found = _differences(first, other)
        if not found:
            continue
        if copied is None:
            copied = only_copied(first)
        also = copied
        if other.tensors.keys() - first.tensors.keys():
            also = also | only_copied(other) - first.tensors.keys()
        for name, text in found.items():
            (ignored if name in also else differences).append((name, text))
    if differences:
        differences.sort()
        shown = "; ".join(text for _, text in differences[:_MAX_DIFFERENCES])
        more = len(differences) - _MAX_DIFFERENCES
        raise CheckpointError(
            f"{first.path}: the checkpoints are not of one model: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + explain_differences(checkpoints)
        )
    if not ignored:
        return []
    names = sorted({name for name, _ in ignored})
    return [
        f"{counted(len(names), 'tensor')} that {'is' if len(names) == 1 else 'are'} only copied "
        f"{'does' if len(names) == 1 else 'do'} not fit in all checkpoints, such as "
        f"{min(ignored)[1]}; the output has what {first.path} has"
    ]


def _differences(first: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """Tensor → how it differs, for every one that does."""
    found: dict[str, str] = {}
    for name in first.tensors.keys() - other.tensors.keys():
        found[name] = f"{quoted(name)} is missing in {other.path}"
    for name in other.tensors.keys() - first.tensors.keys():
        found[name] = f"{quoted(name)} is only in {other.path}"
    for name in first.tensors.keys() & other.tensors.keys():
        one, two = first.tensors[name], other.tensors[name]
        if one.shape != two.shape:
            found[name] = f"{quoted(name)} is {_shape(one)} but {_shape(two)} in {other.path}"
        elif one.dtype != two.dtype and not (is_float(one.dtype) and is_float(two.dtype)):
            found[name] = f"{quoted(name)} is {one.dtype} but {two.dtype} in {other.path}"
    return found


def _shape(entry: TensorEntry) -> str:
    return "x".join(str(size) for size in entry.shape) or "a scalar"


# ---------------------------------------------------------------------- why they differ


def explain_differences(checkpoints: Sequence[Checkpoint]) -> str:
    """What explains the differences, if something simple does; ends the message."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        hint = _prefix_hint(first, other)
        if hint is not None:
            return f"; {hint}"
        for name in first.tensors.keys() & other.tensors.keys():
            one, two = first.tensors[name], other.tensors[name]
            if one.shape != two.shape and (0,) in (one.shape, two.shape):
                return (
                    "; an empty one is what DeepSpeed's ZeRO-3 leaves of a weight that was not "
                    "gathered before it was saved"
                )
    return ""


def _prefix_hint(first: Checkpoint, other: Checkpoint) -> str | None:
    """Says that only a prefix, or parts of names that wrappers add, are different."""
    one, two = first.tensors, other.tensors
    if len(one) != len(two) or one.keys() == two.keys():
        return None
    for longer, shorter, path, without in (
        (two, one, other.path, first.path),
        (one, two, first.path, other.path),
    ):
        length, rest = divmod(sum(map(len, longer)) - sum(map(len, shorter)), len(longer))
        prefix = min(longer)[:length] if length > 0 and not rest else ""
        if prefix.endswith(".") and _is_same(
            longer, shorter, {prefix + name: name for name in shorter}
        ):
            return (
                f"only a prefix differs: {quoted(prefix)}, which all names in {path} have and "
                f"those in {without} have not; save the model inside its wrapper, or rename"
            )
    bare = {_without_wrappers(name): name for name in one}
    renamed = {name: bare.get(_without_wrappers(name), "") for name in two}
    if _is_same(two, one, renamed):
        parts = sorted({part for name in (*one, *two) for part in name.split(".")} & WRAPPERS)
        return (
            f"only what wrappers add to names differs ({', '.join(parts)}): save the model inside "
            f"its wrapper for both {first.path} and {other.path}"
        )
    return None


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_same(
    one: Mapping[str, TensorEntry], two: Mapping[str, TensorEntry], renamed: Mapping[str, str]
) -> bool:
    """Whether ``renamed``, from names in ``one`` to names in ``two``, shows them to be alike."""
    return (
        renamed.keys() == one.keys()
        and len(set(renamed.values())) == len(one)
        and all(name in two and one[n].shape == two[name].shape for n, name in renamed.items())
    )


# ---------------------------------------------------------------------- what looks odd


def check_empty(first: Checkpoint, only_copied: OnlyCopied = nothing) -> list[str]:
    """Name weights that were not saved: of shape [0], as DeepSpeed's ZeRO-3 leaves them.

    A weight that has another size beside the 0 is what its author made it.

    Args:
        first: Θ0.
        only_copied: tells which tensors are no weights.

    Returns:
        A line for the user, if there are some.

    Raises:
        CheckpointError: no weight has elements.
    """
    if all(entry.info.elements for entry in first.tensors.values()):
        return []
    copied = only_copied(first)
    weights = {name: entry for name, entry in first.tensors.items() if name not in copied}
    empty = sorted(name for name, entry in weights.items() if not entry.info.elements)
    if empty and len(empty) == len(weights):
        raise CheckpointError(
            f"{first.path}: all {counted(len(empty), 'weight')} "
            f"{'is' if len(empty) == 1 else 'are'} empty, such as {quoted(empty[0])}: "
            "DeepSpeed's ZeRO-3 leaves that of weights that were not gathered before they were "
            "saved; save them whole, or make them so with zero_to_fp32.py"
        )
    lost = [name for name in empty if weights[name].shape == (0,)]
    if not lost:
        return []
    return [
        f"warning: {first.path}: {len(lost)} of {counted(len(weights), 'weight')} "
        f"{'is' if len(lost) == 1 else 'are'} empty: {quoted_first(lost)}; DeepSpeed's ZeRO-3 "
        "leaves that of weights that were not gathered before they were saved"
    ]


def dtype_notices(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A line for each element type that some checkpoints have where most have another."""
    first = checkpoints[0].tensors
    mixed = {
        name
        for other in checkpoints[1:]
        for name, entry in other.tensors.items()
        if name in first and first[name].info.dtype != entry.info.dtype
    }
    names = [
        name
        for name in sorted(mixed)
        if all(name in c.tensors and is_float(c.tensors[name].dtype) for c in checkpoints)
    ]
    dtypes = [tuple(c.tensors[name].dtype for name in names) for c in checkpoints]
    notices = []
    # Of types that are as frequent, the first checkpoint's are the usual ones.
    for usual, _ in Counter(dtypes).most_common(1):
        for other in dict.fromkeys(dtypes):
            if other == usual:
                continue
            paths = [
                str(c.path) for c, own in zip(checkpoints, dtypes, strict=True) if own == other
            ]
            differ = [k for k in range(len(names)) if other[k] != usual[k]]
            k = differ[0]
            notices.append(
                f"warning: {', '.join(paths)}: {counted(len(differ), 'tensor')} in another element "
                f"type than in the other checkpoints, such as {quoted(names[k])} ({other[k]}, not "
                f"{usual[k]}): what was rounded looks like training"
            )
    return notices
