"""Which tensor is conv, fc or bias, and which is copied: one table, :data:`RULES`.

The authors' release calls every weight with more than two dimensions conv, every matrix fc, and
the rest bias. The rules before those three keep what only looks like a weight from being
predicted, and what only looks like a convolution from being taken for one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial

from know_cli.checkpoints import Checkpoint, Trajectory
from know_cli.errors import UsageError
from know_cli.names import Shape, extent
from know_cli.roles import Role, find_roles
from know_cli.structure import COMPUTABLE, Facts, find_facts

__all__ = [
    "COMPUTABLE",
    "NORMALISATION",
    "OVERRIDE",
    "PREDICTED_KINDS",
    "RULES",
    "RUNNING_STATISTICS",
    "Classification",
    "Kind",
    "Override",
    "Rule",
    "classify",
    "classify_all",
    "classify_trajectory",
    "deciding_rules",
    "parse_override",
]


class Kind(str, Enum):
    """What a tensor is to the hyper-model; ``COPY`` tensors are none of its business."""

    CONV = "conv"
    FC = "fc"
    BIAS = "bias"
    COPY = "copy"


#: The kinds that are predicted, each by its own hyper-model.
PREDICTED_KINDS = (Kind.CONV, Kind.FC, Kind.BIAS)


#: Reasons that other modules ask for.
RUNNING_STATISTICS = "running statistics"
NORMALISATION = "normalisation layer"
OVERRIDE = "--kind"


@dataclass(frozen=True, slots=True)
class Classification:
    """The kind of one tensor, and a phrase for users that says why.

    Attributes:
        kind: what it is.
        reason: why, in words.
        by_behaviour: whether its values told, and not its name: users get a notice.
    """

    kind: Kind
    reason: str
    by_behaviour: bool = False


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What the rules look at.

    Attributes:
        shape: its shape.
        extent: how many of its dimensions are above 1.
        computable: whether its element type can be predicted.
        facts: its name, and what its module says of it.
        roles: what its name says.
    """

    shape: Shape
    extent: int
    computable: bool
    facts: Facts
    roles: frozenset[Role]


@dataclass(frozen=True)
class Rule:
    """A line of the table: a kind, a phrase for users that says why, and when it applies."""

    kind: Kind
    reason: str
    applies: Callable[[_Tensor], bool]


#: The first rule that applies decides; the last three leave nothing.
RULES: tuple[Rule, ...] = (
    Rule(Kind.COPY, "integer, boolean, complex or quantised", lambda t: not t.computable),
    # Structure: what the module that a tensor belongs to says.
    Rule(Kind.COPY, "belongs to a quantised weight", lambda t: t.facts.is_packed),
    Rule(Kind.COPY, "singular vector of spectral norm", lambda t: t.facts.is_spectral),
    Rule(Kind.COPY, RUNNING_STATISTICS, lambda t: t.facts.is_statistic),
    Rule(Kind.BIAS, NORMALISATION, lambda t: t.facts.is_norm),
    # Names of what no gradient moves.
    Rule(Kind.COPY, RUNNING_STATISTICS, lambda t: Role.STATISTIC in t.roles),
    Rule(Kind.COPY, "rotary table", lambda t: Role.ROTARY_TABLE in t.roles),
    Rule(
        Kind.COPY,
        "mask or position buffer",
        lambda t: Role.MASK_OR_INDEX in t.roles,
    ),
    Rule(Kind.COPY, "belongs to a quantised weight", lambda t: Role.QUANTISATION_FACTOR in t.roles),
    Rule(Kind.COPY, "weight of a loss", lambda t: Role.LOSS_WEIGHT in t.roles),
    Rule(Kind.COPY, "balances experts, by a rule", lambda t: t.facts.is_routing_bias),
    # Weights, and tables that are not trained.
    Rule(
        Kind.FC,
        "embedding, table or token, by name",
        lambda t: t.extent > 0 and Role.TABLE in t.roles,
    ),
    Rule(Kind.COPY, "fixed table", lambda t: Role.FIXED_TABLE in t.roles),
    Rule(
        Kind.BIAS,
        "one factor a channel",
        lambda t: t.extent < 2 and (Role.WEIGHT not in t.roles or Role.FACTOR in t.roles),
    ),
    Rule(Kind.BIAS, "bias", lambda t: t.facts.leaf == "bias"),
    Rule(
        Kind.CONV,
        "weight of more than two dimensions",
        lambda t: Role.CONVOLUTION in t.roles,
    ),
    Rule(Kind.FC, "matrix, or a stack of them", lambda t: len(t.shape) > 1),
    Rule(Kind.BIAS, "one dimension or none", lambda t: True),
)


def deciding_rules(tensors: Mapping[str, tuple[Shape, str]]) -> dict[str, Rule]:
    """The line of the table that decides on each tensor of a checkpoint.

    Args:
        tensors: name → (shape, safetensors dtype).
    """
    facts = find_facts(tensors)
    result = {}
    for name, (shape, dtype) in tensors.items():
        of = facts[name]
        roles = find_roles(of.path, of.leaf, shape)
        tensor = _Tensor(shape, extent(shape), dtype in COMPUTABLE, of, roles)
        result[name] = next(rule for rule in RULES if rule.applies(tensor))
    return result


def classify(name: str, shape: Shape, dtype: str) -> Classification:
    """The kind of one tensor that stands alone; :func:`classify_all` sees more.

    >>> classify("conv1.weight", (64, 3, 7, 7), "F32").kind
    <Kind.CONV: 'conv'>

    Args:
        name: in the state dict.
        shape: its shape, empty for a scalar.
        dtype: its safetensors dtype, such as ``F32``.
    """
    return classify_all({name: (shape, dtype)})[name]


@dataclass(frozen=True)
class Override:
    """A user's ``PATTERN=KIND``: a glob on tensor names, and the kind of those it matches."""

    pattern: str
    kind: Kind


def parse_override(text: str) -> Override:
    """Read ``PATTERN=KIND``.

    >>> parse_override("head.*=copy")
    Override(pattern='head.*', kind=<Kind.COPY: 'copy'>)

    Raises:
        ValueError: there is no pattern, or no such kind; the message quotes ``text``.
    """
    pattern, _, kind = text.rpartition("=")
    kinds = ", ".join(item.value for item in Kind)
    if not pattern or kind not in [item.value for item in Kind]:
        raise ValueError(f"--kind {text}: write PATTERN=KIND with a kind of {kinds}")
    return Override(pattern, Kind(kind))


def classify_all(
    tensors: Mapping[str, tuple[tuple[int, ...], str]], overrides: Sequence[Override] = ()
) -> dict[str, Classification]:
    """The kind of every tensor of a checkpoint.

    Args:
        tensors: name → (shape, safetensors dtype).
        overrides: of the user; where several match a tensor, the last one counts.

    Raises:
        ValueError: an override matches nothing, or would predict what cannot be computed.
    """
    result = {
        name: Classification(rule.kind, rule.reason)
        for name, rule in deciding_rules(tensors).items()
    }
    for override in overrides:
        matched = [name for name in tensors if fnmatchcase(name, override.pattern)]
        text = f"{OVERRIDE} {override.pattern}={override.kind.value}"
        if not matched:
            close = difflib.get_close_matches(override.pattern, list(tensors), n=3, cutoff=0.4)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise ValueError(f"{text}: matches no tensor{hint}")
        for name in matched:
            dtype = tensors[name][1]
            if override.kind is not Kind.COPY and dtype not in COMPUTABLE:
                raise ValueError(f"{text}: tensor {name!r} is {dtype}, which can only be copied")
            result[name] = Classification(override.kind, text)
    return result


def classify_trajectory(
    trajectory: Trajectory, overrides: Sequence[Override] = ()
) -> dict[str, Classification]:
    """Kind of every tensor of a trajectory.

    Raises:
        UsageError: an override matches nothing, or wants what cannot be predicted.
    """
    tensors = {name: (e.shape, e.dtype) for name, e in trajectory.first.tensors.items()}
    try:
        return classify_all(tensors, overrides)
    except ValueError as error:
        raise UsageError(str(error)) from error


def only_copied(overrides: Sequence[Override] = ()) -> Callable[[Checkpoint], frozenset[str]]:
    """What tells the names of a checkpoint's tensors that are no weights, by their kinds.

    Overrides that match nothing, or want what cannot be, are refused by
    :func:`classify_trajectory`.
    """
    return partial(_copied, overrides)


def _copied(overrides: Sequence[Override], checkpoint: Checkpoint) -> frozenset[str]:
    tensors = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.tensors.items()}
    kinds = {name: found.kind for name, found in classify_all(tensors).items()}
    for override in overrides:
        matched = [name for name in kinds if fnmatchcase(name, override.pattern)]
        kinds |= dict.fromkeys(matched, override.kind)
    return frozenset(name for name, kind in kinds.items() if kind is Kind.COPY)
