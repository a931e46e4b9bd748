"""Which tensor is conv, fc or bias, and which is copied: one table, :data:`RULES`.

The authors' release calls every weight with more than two dimensions conv, every matrix fc, and
the rest bias. The rules before those three keep what only looks like a weight from being
predicted, and what only looks like a convolution from being taken for one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial

from know_cli.checkpoints import Checkpoint, Trajectory
from know_cli.errors import UsageError

#: Element types that can be predicted, by their safetensors names.
COMPUTABLE = frozenset({"F64", "F32", "F16", "BF16"})


class Kind(str, Enum):
    """What a tensor is to the hyper-model; ``COPY`` tensors are none of its business."""

    CONV = "conv"
    FC = "fc"
    BIAS = "bias"
    COPY = "copy"


#: The kinds that are predicted, each by a KNOWN of its own.
PREDICTED_KINDS = (Kind.CONV, Kind.FC, Kind.BIAS)


@dataclass(frozen=True, slots=True)
class Classification:
    """The kind of one tensor, and a phrase for users that says why."""

    kind: Kind
    reason: str


@dataclass(frozen=True)
class Rule:
    """A line of the table; a tensor matches if all that is given matches.

    Attributes:
        kind: the answer.
        reason: a phrase for users.
        name: pattern that the end of the dotted name must match, from the start of a part on.
        dimensions: the numbers of dimensions that match; None for any.
        computable: whether the element type must be one that can be predicted (True), must not
            (False), or does not matter (None).
    """

    kind: Kind
    reason: str
    name: str | None = None
    dimensions: range | None = None
    computable: bool | None = None

    def matches(self, name: str, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a tensor of this name, shape and safetensors dtype is meant."""
        return (
            (self.computable is None or (dtype in COMPUTABLE) == self.computable)
            and (self.dimensions is None or len(shape) in self.dimensions)
            and (self.name is None or re.search(rf"(?:^|\.)(?:{self.name})$", name) is not None)
        )


_MANY = 1 << 16

#: The first rule that matches decides; the last three match everything.
RULES: tuple[Rule, ...] = (
    Rule(Kind.COPY, "integer, boolean, complex or quantised", computable=False),
    Rule(Kind.COPY, "running statistics", r"running_mean|running_var|num_batches_tracked"),
    Rule(
        Kind.COPY,
        "rotary table",
        r"(?:\w+_)?inv_freq|cos_cached|sin_cached|freqs_cis|rope_freqs|freqs_(?:cos|sin)",
    ),
    Rule(
        Kind.COPY,
        "mask or position buffer",
        r"position_ids|masked_bias|attn_mask|causal_mask|relative_position_index"
        r"|relative_coords_table",
    ),
    # GPT-2's causal mask is called "bias" and has four dimensions; a real bias has one.
    Rule(Kind.COPY, "mask or position buffer", r"(?:attn|attention)\.bias", range(3, _MANY)),
    Rule(
        Kind.COPY,
        "belongs to a quantised weight",
        r"qweight|qzeros|scales|g_idx|zero_points?|(?:weight|input|output|k|v)_scale(?:_inv)?"
        r"|(?:weight|input)_zero_point|SCB|(?:weight\.)?(?:nested_)?(?:absmax|quant_map)"
        r"|weight\.quant_state\.\w+",
    ),
    Rule(
        Kind.FC,
        "embedding, table or token, by name",
        r"(?:\w*_)?(?:cls|class|mask|dist|distillation|register|query|latent|prompt|reg)_tokens?"
        r"|class_embedding|(?:\w*_)?pos(?:ition(?:al)?)?_embed(?:ding)?s?(?:_\w+)?"
        r"|\w*position_bias_table|rel_pos_[hw]|latents?|queries",
        range(1, _MANY),
    ),
    Rule(Kind.FC, "stacked expert matrices", r"(?:\w*experts)(?:\.\w+)*", range(3, 4)),
    Rule(
        Kind.BIAS,
        "one factor a channel, by name",
        r"(?:\w*_)?layer_scale(?:_\w+)?|logit_scale|gamma(?:_\w+)?",
        range(3, _MANY),
    ),
    Rule(Kind.CONV, "more than two dimensions", dimensions=range(3, _MANY)),
    Rule(Kind.FC, "two dimensions", dimensions=range(2, 3)),
    Rule(Kind.BIAS, "one dimension or none", dimensions=range(2)),
)


def classify(name: str, shape: tuple[int, ...], dtype: str) -> Classification:
    """The kind of one tensor.

    Args:
        name: in the state dict.
        shape: its shape, empty for a scalar.
        dtype: its safetensors dtype, such as ``F32``.
    """
    rule = next(rule for rule in RULES if rule.matches(name, shape, dtype))
    return Classification(rule.kind, rule.reason)


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
    result = {name: classify(name, *tensor) for name, tensor in tensors.items()}
    for override in overrides:
        matched = [name for name in tensors if fnmatchcase(name, override.pattern)]
        text = f"--kind {override.pattern}={override.kind.value}"
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
