"""What the values of a tensor over the checkpoints say of it, where its name says nothing.

A weight that training moves is hardly ever of length 1 in all checkpoints, or of 0 and 1 only,
or whole: such tensors are buffers, and predicting them would damage the model. The rules look for
what weights do not do. What some weights do, too, such as never being negative (every factor of a
normalisation layer near its start), counts only beside other evidence.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from know_cli.errors import quoted
from know_cli.kinds import NORMALISATION, OVERRIDE, RUNNING_STATISTICS, Classification, Kind
from know_cli.names import Path, Shape, extent, read_name
from know_cli.normalisation import NormLayer
from know_cli.roles import is_weight

#: Elements of a tensor that are looked at; of vectors that may be of unit length, all.
FIRST_ELEMENTS = 1 << 15
# Longer vectors are no singular vectors of a layer.
_LONGEST_VECTOR = 1 << 22
# How far rounding to an element type may move the length of a unit vector, generously; and up to
# which size the type tells whole numbers from others.
_LENGTH_ERROR = {"F64": 1e-4, "F32": 1e-4, "F16": 2e-3, "BF16": 1e-2}
_LARGEST_WHOLE = {"F64": 2.0**52, "F32": 2.0**23, "F16": 2.0**10, "BF16": 2.0**7}
# Fewer values than this may grow by chance all the time.
_MANY_VALUES = 16
# GELU and SiLU do not go below; what they let through is much larger.
_SMOOTH_FLOOR, _SMOOTH_RATIO = -0.28, 10.0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Facts about one tensor's values over all checkpoints.

    Attributes:
        elements: how many were looked at.
        is_whole_tensor: whether those were all.
        moves: whether any of them differs between the checkpoints.
        has_unit_length: whether it is a vector of two or more values that has length 1 in all
            checkpoints, as far as its element type can tell.
        is_binary: whether all are 0 or 1, or all 0 or −∞, in all checkpoints, and both occur.
        is_whole: whether all are whole numbers, small enough for the type to tell.
        is_count: whether all are whole numbers of any size, none below 0, that grow.
        is_never_negative: whether all are finite, and none is below 0.
        grows: whether no element ever falls, or none ever rises, from one checkpoint to the
            next, and the sum changes every time.
        lowest: the least value; NaN if one is not finite.
        highest: the greatest value; NaN if one is not finite.
        growth: greatest of the checkpoints' sums over the least; NaN unless both are positive.
    """

    elements: int = 0
    is_whole_tensor: bool = False
    moves: bool = False
    has_unit_length: bool = False
    is_binary: bool = False
    is_whole: bool = False
    is_count: bool = False
    is_never_negative: bool = False
    grows: bool = False
    lowest: float = math.nan
    highest: float = math.nan
    growth: float = math.nan


def least_precise(dtypes: Iterable[str]) -> str:
    """Of some safetensors dtypes of floats the one with the fewest digits.

    >>> least_precise(["F32", "BF16", "F16"])
    'BF16'
    """
    return max(dtypes, key=_LENGTH_ERROR.__getitem__)


class BehaviourWatch:
    """Gathers a tensor's :class:`Behaviour` from chunks of it, in memory of one chunk.

    >>> watch = BehaviourWatch((3,), "F32")
    >>> watch.add(torch.tensor([[0.0, 0.6, 0.8], [0.6, 0.0, -0.8]]))
    >>> watch.behaviour().has_unit_length
    True
    """

    def __init__(self, shape: Shape, dtype: str) -> None:
        """Begin.

        Args:
            shape: of the tensor.
            dtype: its safetensors dtype, one of ``F64``, ``F32``, ``F16``, ``BF16``; the one
                with the fewest digits where the checkpoints have several.
        """
        self._size = math.prod(shape)
        self._is_vector = extent(shape) == 1
        self._dtype = dtype
        self._elements = 0
        self._moves = False
        self._zero_or_one = self._zero_or_masked = self._whole = self._finite = True
        self._has_zero = self._has_other = False
        self._rises = self._falls = True
        self._lowest, self._highest = math.inf, -math.inf
        self._sums: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in the next elements.

        Args:
            values: ``[S, count]``, floats of any type, the same elements of all checkpoints.
        """
        values = values.double()
        if values.shape[1] == 0:
            return
        self._elements += values.shape[1]
        zero = values == 0
        self._has_zero |= bool(zero.any())
        self._has_other |= not bool(zero.all())
        self._zero_or_one &= bool((zero | (values == 1)).all())
        self._zero_or_masked &= bool((zero | (values == -math.inf)).all())
        self._finite &= bool(torch.isfinite(values).all())
        self._moves |= bool((values[1:] != values[0]).any())
        if not self._finite:
            return
        self._whole &= bool((values == values.round()).all())
        self._lowest = min(self._lowest, float(values.min()))
        self._highest = max(self._highest, float(values.max()))
        steps = values.diff(dim=0)
        self._rises &= bool((steps >= 0).all())
        self._falls &= bool((steps <= 0).all())
        sums, squares = values.sum(dim=1), values.square().sum(dim=1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def is_ordinary(self) -> bool:
        """Whether it is no vector, and no further elements can make it anything but a weight."""
        if self._is_vector or not self._elements or self._zero_or_one or self._zero_or_masked:
            return False
        return not self._finite or (self._lowest < 0 and not self._is_whole)

    @property
    def _is_whole(self) -> bool:
        """Whether all are whole numbers, and so small that the type has others beside them."""
        largest = max(-self._lowest, self._highest)
        return self._whole and largest <= _LARGEST_WHOLE[self._dtype]

    def behaviour(self) -> Behaviour:
        """What was seen so far."""
        complete = self._elements == self._size
        binary = self._has_zero and self._has_other and (self._zero_or_one or self._zero_or_masked)
        found = Behaviour(self._elements, complete, self._moves, is_binary=binary)
        if not self._finite or self._sums is None or self._squares is None:
            return found
        least, most = float(self._sums.min()), float(self._sums.max())
        error = float((self._squares.sqrt() - 1).abs().max())
        grows = (self._rises or self._falls) and bool((self._sums.diff() != 0).all())
        return replace(
            found,
            has_unit_length=self._is_vector and complete and error <= _LENGTH_ERROR[self._dtype],
            is_whole=self._is_whole,
            is_count=self._whole and self._lowest >= 0 and grows,
            is_never_negative=self._lowest >= 0,
            grows=grows,
            lowest=self._lowest,
            highest=self._highest,
            growth=most / least if least > 0 else math.nan,
        )


def elements_to_watch(
    tensors: Mapping[str, tuple[Shape, str]],
    classes: Mapping[str, Classification],
    layers: Iterable[NormLayer] = (),
) -> dict[str, int]:
    """How many elements of each tensor, from its start, are worth a look.

    Of most tensors the first :data:`FIRST_ELEMENTS` tell what there is to tell. Unit length needs
    a vector whole, and so does the question whether running means are ever negative.

    Args:
        tensors: name → (shape, safetensors dtype).
        classes: the kind of each.
        layers: the normalisation layers; running means of those with a source are looked at.

    Returns:
        Name → number of elements, at least 1; tensors that are copied anyhow are left out.
    """
    means = {layer.running_mean for layer in layers if layer.source_weight is not None}
    found = {}
    for name, (shape, dtype) in tensors.items():
        if dtype not in _LENGTH_ERROR or not math.prod(shape):
            continue
        if name in means:
            found[name] = math.prod(shape)
        elif classes[name].kind is not Kind.COPY and _is_open(classes[name]):
            whole = extent(shape) == 1 and math.prod(shape) <= _LONGEST_VECTOR
            found[name] = math.prod(shape) if whole else min(math.prod(shape), FIRST_ELEMENTS)
    return found


def settle(
    classes: Mapping[str, Classification], behaviours: Mapping[str, Behaviour]
) -> dict[str, Classification]:
    """The kinds by name and behaviour together.

    Only ever is a tensor that would be predicted copied instead; what the user said, and the
    parameters of normalisation layers, stay.

    Args:
        classes: kinds by name and structure.
        behaviours: of some or all tensors.

    Returns:
        As ``classes``; where behaviour decided, ``by_behaviour`` is set.
    """
    statistics: dict[Path, bool] = defaultdict(bool)
    for name, found in classes.items():
        if found.kind is Kind.COPY and found.reason == RUNNING_STATISTICS:
            statistics[_module(name)[0]] = True
    result = dict(classes)
    for name, behaviour in behaviours.items():
        found = classes[name]
        if found.kind is Kind.COPY or not _is_open(found):
            continue
        module, leaf = _module(name)
        is_named = is_weight(leaf) or leaf == "bias"
        reason = _reason(behaviour, is_named, statistics[module])
        if reason is not None:
            result[name] = Classification(Kind.COPY, reason, by_behaviour=True)
    return result


def _is_open(found: Classification) -> bool:
    return not found.reason.startswith(OVERRIDE) and found.reason != NORMALISATION


def _module(name: str) -> tuple[Path, str]:
    read = read_name(name)
    return read.path, read.leaf


def _reason(seen: Behaviour, is_named: bool, beside_statistics: bool) -> str | None:
    """Why a tensor cannot be a weight that is trained; None if it can.

    Args:
        seen: its behaviour.
        is_named: whether it is called weight or bias: a few whole numbers do not refute that.
        beside_statistics: whether its module has running statistics.
    """
    if not seen.moves:
        return None
    if seen.elements > 1 and seen.has_unit_length:
        return "a vector of length 1 in all checkpoints, as spectral norm keeps them"
    if seen.is_binary and (not is_named or seen.elements >= _MANY_VALUES):
        return "only 0 and 1 in all checkpoints, as in a mask"
    # Beyond what the type can tell from others, numbers that only ever rise are still a counter's.
    if (seen.is_whole and (not is_named or seen.elements >= _MANY_VALUES)) or (
        seen.is_count and not is_named
    ):
        return "whole numbers in all checkpoints, as in a counter"
    if seen.is_never_negative and beside_statistics and not is_named:
        return "never negative, and beside running statistics"
    if seen.is_never_negative and seen.grows and seen.elements >= _MANY_VALUES and seen.growth >= 2:
        return "grows in every session, as a sum does"
    return None


def without_rectified_sources(
    layers: Iterable[NormLayer], behaviours: Mapping[str, Behaviour]
) -> list[NormLayer]:
    """Normalisation layers, those without a source that an activation separates from theirs.

    Means of what comes out of ReLU are never negative, and of what comes out of GELU or SiLU
    hardly ever; rescaling them with the convolution before the activation would be wrong.

    Args:
        layers: as :func:`~know_cli.normalisation.find_norm_layers` gives them.
        behaviours: of their running means, looked at whole.
    """
    result = []
    for layer in layers:
        seen = behaviours.get(layer.running_mean or "")
        if layer.source_weight is not None and seen is not None and _is_rectified(seen):
            layer = replace(layer, source_weight=None, source_bias=None, is_behind_activation=True)
        result.append(layer)
    return result


def _is_rectified(means: Behaviour) -> bool:
    if means.is_never_negative and means.highest > 0:
        return True
    return (
        means.elements >= _MANY_VALUES
        and _SMOOTH_FLOOR <= means.lowest < 0
        and means.highest > -_SMOOTH_RATIO * means.lowest
    )


def copied_by_behaviour(classes: Mapping[str, Classification]) -> list[str]:
    """A line for the user on each group of tensors that are copied for what their values do.

    Args:
        classes: as :func:`settle` gives them.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, found in classes.items():
        if found.by_behaviour:
            groups[found.reason].append(name)
    lines = []
    for reason, names in groups.items():
        those = quoted(names[0])
        if len(names) > 1:
            those = f"{len(names)} tensors, {those} and others,"
        verb = "are" if len(names) > 1 else "is"
        lines.append(
            f"{those} {verb} copied: {reason}; if the model trains such values, say "
            "--kind 'PATTERN=KIND'"
        )
    return lines
