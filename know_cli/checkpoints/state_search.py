"""Where in what a training program saved the state dict of the model is.

The rules are in ``docs/convert.md``. What they leave open is asked of the user (``--key``), never
guessed: a moving average and the weights that it is of, say, have the same names and shapes.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from know_cli.checkpoints.header import METADATA_KEY
from know_cli.checkpoints.json_text import MAX_OBJECTS, is_unicode
from know_cli.checkpoints.pickle_names import Name, Opaque, PickledTensor
from know_cli.errors import CheckpointError, counted, quoted

#: ``--key`` for the outermost mapping.
TOP = "."
#: Under what training programs keep the model's state dict, the usual ones first.
USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
# Parts of a training state that hold tensors, but not the model's.
_TRAINING = re.compile(r"optim|sched|scaler|callback|hook|(^|_)rng|(^|_)loops?$", re.IGNORECASE)
# What optimizers keep for each parameter, by names that no model uses.
_SLOTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg",
    "acc_delta",
}  # fmt: skip
_AVERAGES = {"ema", "swa", "averaged", "average", "avg", "polyak", "shadow"}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_OF_MODULES = {"weight", "bias", "running_mean", "running_var"}
_MAX_DEPTH = 12
_MAX_LISTED = 8
_MAX_COMPARED = 64


@dataclass
class Found:
    """A state dict, and what was found beside it.

    Attributes:
        tensors: by name, in the order in which they were saved.
        key: under which it was; empty if it was all there is.
        is_average: whether the key says that it is a moving average of the weights.
        left_out: names in it that are no tensors.
        strays: names of tensors in the mappings around it.
        averages: keys of other state dicts that are moving averages, by their names.
    """

    tensors: dict[str, PickledTensor]
    key: str
    is_average: bool = False
    left_out: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    averages: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A mapping, the keys that lead to it, and the tensors in it."""

    parts: tuple[str, ...]
    mapping: Mapping[Any, Any]
    tensors: dict[Any, PickledTensor]

    @staticmethod
    def of(parts: tuple[str, ...], mapping: Mapping[Any, Any]) -> _Candidate:
        tensors = {name: v for name, v in mapping.items() if isinstance(v, PickledTensor)}
        return _Candidate(parts, mapping, tensors)

    @cached_property
    def elements(self) -> int:
        """Of what may be a weight; counters, losses and the states of generators are none."""
        return sum(math.prod(t.shape) for t in self.tensors.values() if _is_like_weights(t))

    @property
    def key(self) -> str:
        return ".".join(self.parts) or TOP

    @property
    def is_usual(self) -> bool:
        return self.parts[-1:] != () and self.parts[-1] in USUAL

    @property
    def is_average(self) -> bool:
        return any(is_average(part) for part in self.parts)

    def is_inside(self, other: _Candidate) -> bool:
        size = len(other.parts)
        return len(self.parts) > size and self.parts[:size] == other.parts


def find_state(path: Path, content: Any, key: str = "") -> Found:
    """Find the state dict of a model in what ``torch.save`` was given.

    Args:
        path: of the file, for messages.
        content: as :class:`~know_cli.checkpoints.torch_files.TorchFile` has it.
        key: keys that lead to it, with dots between them; :data:`TOP` for the outermost mapping;
            empty to search.

    Raises:
        CheckpointError: there is none, or more than one; the message lists the keys.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds {_kind(content)}, not a state dict; save state_dict() alone"
        )
    every = _candidates(content)
    chosen = _under(path, content, key, every) if key else _only(path, content, every)
    found = _checked(path, chosen)
    found.averages = [
        other.key
        for other in every
        if other.is_average and not chosen.is_average and other.mapping is not chosen.mapping
    ]
    found.strays = [
        ".".join((*around.parts, name))
        for around in every
        if chosen.is_inside(around)
        for name in around.tensors
    ]
    return found


def is_average(name: str) -> bool:
    """Whether a name says that something is a moving average of weights.

    >>> [is_average(name) for name in ("ema", "model_ema", "StateDictEMA", "schema")]
    [True, True, True, False]
    """
    return any(word.lower() in _AVERAGES for word in _WORDS.findall(name))


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, (Opaque, Name)):
        name = value.kind if isinstance(value, Opaque) else value.path
        return f"an object of {quoted(name)}"
    kinds: tuple[tuple[Any, str], ...] = (
        (PickledTensor, "a tensor"),
        (Mapping, "a mapping"),
        (list, "a list"),
        (tuple, "a tuple"),
        (str, "a text"),
        ((bool, int, float), "a number"),
        (type(None), "None"),
    )
    return next((word for kind, word in kinds if isinstance(value, kind)), "no mapping")


def _is_like_weights(tensor: PickledTensor) -> bool:
    is_float = "float" in tensor.dtype or "complex" in tensor.dtype
    return bool(tensor.problem) or len(tensor.shape) > 1 or (is_float and len(tensor.shape) == 1)


def _candidates(content: Mapping[Any, Any]) -> list[_Candidate]:
    """All mappings with tensors that may be a model's, the outer ones first.

    A mapping that is there several times, or in itself, counts once. Without the names of
    what belongs to training nothing else may be left, and then they say nothing.
    """
    found: list[_Candidate] = []
    aside: list[_Candidate] = []
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    while waiting:
        parts, mapping = waiting.popleft()
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        candidate = _Candidate.of(parts, mapping)
        tensors = candidate.tensors
        if tensors and tensors.keys().isdisjoint(_SLOTS):
            is_aside = any(_TRAINING.search(part) for part in parts)
            (aside if is_aside else found).append(candidate)
        if len(parts) < _MAX_DEPTH:
            waiting.extend(
                ((*parts, key), value)
                for key, value in mapping.items()
                if isinstance(value, Mapping)
                and isinstance(key, str)
                and not (tensors and _is_of_a_module(key))
            )
    return found or aside


def _is_of_a_module(key: str) -> bool:
    """Whether something beside tensors is what a module keeps, such as ``fc._extra_state``."""
    return "." in key or key.endswith("_extra_state") or key == "_metadata"


def _only(path: Path, content: Mapping[Any, Any], every: list[_Candidate]) -> _Candidate:
    """The one candidate that is left when stray tensors and what is no model's are put aside."""
    left = [one for one in every if one.elements or one.is_usual] or every
    if len(left) <= _MAX_COMPARED:
        left = [
            one
            for one in left
            if not any(other.is_inside(one) and _is_stray_around(one, other) for other in left)
        ]
    different: list[_Candidate] = []
    for candidate in left[:_MAX_COMPARED]:
        if not any(candidate.tensors == other.tensors for other in different):
            different.append(candidate)
    if not different:
        raise CheckpointError(
            f"{path}: holds no state dict, no mapping with a model's tensors; {_keys(content)}"
        )
    if len(different) > 1:
        raise CheckpointError(
            f"{path}: holds more than one state dict: {_listed(different)}; choose one with --key"
        )
    return different[0]


def _is_stray_around(outer: _Candidate, inner: _Candidate) -> bool:
    """Whether the tensors beside a nested state dict are not those of a model themselves."""
    names = outer.tensors
    if any("." in str(name) or name in _OF_MODULES for name in names):
        return False
    return inner.is_usual or outer.elements < inner.elements


def _under(path: Path, content: Mapping[Any, Any], key: str, every: list[_Candidate]) -> _Candidate:
    """What ``--key`` names, or the only state dict within."""
    parts = () if key == TOP else _resolved(content, key)
    problem = "there is no such key"
    if parts is not None:
        value: Any = content
        for part in parts:
            value = value[part]
        if isinstance(value, Mapping):
            candidate = _Candidate.of(parts, value)
            if candidate.tensors:
                return candidate
            inner = [replace(one, parts=(*parts, *one.parts)) for one in _candidates(value)]
            if inner:
                return _only(path, content, inner)
        problem = f"is {_kind(value)}, not a state dict"
    there = f"state dicts are {_listed(every)}" if every else _keys(content)
    raise CheckpointError(f"{path}: --key {key}: {problem}; {there}")


def _resolved(content: Mapping[Any, Any], key: str) -> tuple[str, ...] | None:
    """The keys that a dotted text stands for; they may have dots themselves."""
    waiting: list[tuple[Mapping[Any, Any], str, tuple[str, ...]]] = [(content, key, ())]
    tried: set[tuple[int, int]] = set()
    while waiting:
        mapping, rest, parts = waiting.pop()
        if rest in mapping:
            return (*parts, rest)
        if (id(mapping), len(rest)) in tried:
            continue
        tried.add((id(mapping), len(rest)))
        for dot in re.finditer(r"\.", rest):
            value = mapping.get(rest[: dot.start()])
            if isinstance(value, Mapping):
                waiting.append((value, rest[dot.end() :], (*parts, rest[: dot.start()])))
    return None


def _listed(candidates: Iterable[_Candidate]) -> str:
    every = list(candidates)
    shown = [
        f"{quoted(one.key)} ({counted(len(one.tensors), 'tensor')}"
        f"{', a moving average' if one.is_average else ''})"
        for one in every[:_MAX_LISTED]
    ]
    more = len(every) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _keys(content: Mapping[Any, Any]) -> str:
    """The outermost keys, for a message."""
    shown = [f"{quoted(key)} ({_kind(value)})" for key, value in content.items()][:_MAX_LISTED]
    more = len(content) - len(shown)
    if not shown:
        return "it is empty"
    return f"its keys are {', '.join(shown)}" + (f" and {more} more" if more else "")


def _checked(path: Path, chosen: _Candidate) -> Found:
    """The state dict, if all its names can be those of tensors in a file."""
    found = Found({}, ".".join(chosen.parts), chosen.is_average)
    if len(chosen.mapping) > MAX_OBJECTS:
        raise CheckpointError(f"{path}: has more than the {MAX_OBJECTS} tensors that are read")
    for name, value in chosen.mapping.items():
        if not isinstance(name, str) or not is_unicode(name):
            raise CheckpointError(f"{path}: has {quoted(name)} where a tensor's name should be")
        if not isinstance(value, PickledTensor):
            found.left_out.append(name)
        elif name == METADATA_KEY:
            raise CheckpointError(
                f"{path}: has a tensor called {METADATA_KEY!r}, the one name that safetensors "
                "files do not have; rename it and save the checkpoint again"
            )
        else:
            found.tensors[name] = value
    return found
