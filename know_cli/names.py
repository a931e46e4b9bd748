"""Names of tensors: wrappers dropped, the module told from the parameter, words split.

``module.encoder._orig_mod.norm1.weight`` is the parameter ``weight`` of the module
``encoder.norm1``, whatever wrapped it on the way. Everything here takes time in proportion to
the length of a name, and names that no model has are not read at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

Shape = tuple[int, ...]
Path = tuple[str, ...]

#: Of names of more parts, and of longer parts, which no model has, only the end is read.
MAX_PARTS = 64
MAX_PART_LENGTH = 256

# What torch.compile, DataParallel, FSDP, activation checkpointing and PEFT put into names.
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "base_layer",
        "original_module",
    }
)
# PEFT's copy of a module that is trained whole; the part after it names the adapter.
_SAVED = "modules_to_save"
# A parameter that is itself taken apart: `weight.absmax`, `parametrizations.weight.original0`.
_PARAMETRIZATIONS = "parametrizations"
_TAKEN_APART = frozenset({"weight", "bias", _PARAMETRIZATIONS})
# TensorFlow's first, and for a variable only, output of an operation.
_OUTPUT = ":0"
_ORIGINALS = {"original": "orig", "original0": "g", "original1": "v"}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DIGITS = re.compile(r"\d+")


@lru_cache(maxsize=1 << 14)
def words(text: str) -> tuple[str, ...]:
    """The words of one part of a name, in lower case and without numbers.

    >>> words("q_LayerNorm2d_1")
    ('q', 'layer', 'norm', 'd')
    """
    return tuple(word.lower() for word in _WORD.findall(text))


@lru_cache(maxsize=1 << 14)
def generic(part: str) -> str:
    """One part of a name with its numbers replaced, so that repeated blocks look alike."""
    return _DIGITS.sub("#", part)


def _without_wrappers(name: str) -> list[tuple[int, str]]:
    """The parts of a name that wrappers did not add, each with its position in the name.

    The last part is the parameter's and stays, whatever it is called. No parameter has a slash in
    its own name: a name that ends so is Flax's or TensorFlow's, which slashes divide.
    """
    if "/" in name[name.rfind(".") + 1 :]:
        name = name.replace("/", ".")
    parts = name.rsplit(".", MAX_PARTS)
    position = 0
    if len(parts) > MAX_PARTS:
        position = len(parts.pop(0)) + 1
    last = len(parts) - 1
    kept: list[tuple[int, str]] = []
    skip = False
    for index, part in enumerate(parts):
        if index == last:
            kept.append((position, part[-MAX_PART_LENGTH:]))
        elif skip:
            skip = False
        elif part == _SAVED:
            skip = index + 1 < last
        elif part not in _WRAPPERS:
            kept.append((position, part[-MAX_PART_LENGTH:]))
        position += len(part) + 1
    return kept


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor's name, read.

    Attributes:
        path: the module's name in parts, without wrappers.
        leaf: the parameter within it; what belongs to a parameter that is taken apart is joined
            to it (``weight.absmax``), and torch's parametrizations get the names that the hooks
            before them used (``weight_g``, ``weight_v``, ``weight_orig``). TensorFlow's number of
            an operation's output (``kernel:0``) is dropped.
        prefix: the module's name as it is in the file, wrappers and all.
    """

    path: Path
    leaf: str
    prefix: str


def read_name(name: str) -> TensorName:
    """Read a tensor's name.

    >>> read_name("module.conv.parametrizations.weight.original1")
    TensorName(path=('conv',), leaf='weight_v', prefix='module.conv')
    >>> read_name("params/LayerNorm_0/scale:0")
    TensorName(path=('params', 'LayerNorm_0'), leaf='scale', prefix='params/LayerNorm_0')
    """
    kept = _without_wrappers(name.removesuffix(_OUTPUT))
    parts = [part for _, part in kept]
    owner = len(parts) - 1
    for index in range(owner):
        if parts[index] in _TAKEN_APART:
            owner = index
            break
    rest = parts[owner:]
    leaf = ".".join(rest)
    if rest[0] == _PARAMETRIZATIONS and len(rest) > 2:
        if len(rest) == 3 and rest[2] in _ORIGINALS:
            leaf = f"{rest[1]}_{_ORIGINALS[rest[2]]}"
        elif rest[-1] in ("_u", "_v"):
            leaf = f"{rest[1]}_spectral{rest[2]}{rest[-1]}"
    return TensorName(tuple(parts[:owner]), leaf, name[: max(kept[owner][0] - 1, 0)])


@dataclass(slots=True)
class Module:
    """The tensors that belong to one module.

    Attributes:
        path: its name in parts, without wrappers.
        prefix: its name as in the file.
        tensors: leaf → full name.
        shapes: leaf → shape.
        unique: whether no other module has this path (PEFT keeps an original beside its copy).
    """

    path: Path
    prefix: str
    tensors: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    unique: bool = True


def group_by_module(shapes: Mapping[str, Shape]) -> list[Module]:
    """The modules of a checkpoint, sorted by their names in the file.

    Args:
        shapes: shape of every tensor by name.
    """
    read = {name: read_name(name) for name in shapes}
    prefixes: dict[tuple[Path, str], str] = {}
    split: set[Path] = set()
    for found in read.values():
        if prefixes.setdefault((found.path, found.leaf), found.prefix) != found.prefix:
            split.add(found.path)
    modules: dict[tuple[Path, str], Module] = {}
    for name, found in sorted(read.items()):
        key = found.path, found.prefix if found.path in split else ""
        module = modules.setdefault(
            key, Module(found.path, found.prefix, unique=found.path not in split)
        )
        module.tensors[found.leaf] = name
        module.shapes[found.leaf] = shapes[name]
    return sorted(modules.values(), key=lambda module: module.prefix)


def extent(shape: Iterable[int]) -> int:
    """How many dimensions of a shape are above 1: what is left of it but for broadcasting."""
    return sum(size > 1 for size in shape)
