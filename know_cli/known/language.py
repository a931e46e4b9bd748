"""Whether a checkpoint is of a language model, or of an adapter, by its tensors' names and shapes.

On such, of all that was measured (docs/expectations.md), the shipped default is a worse start than
Θ0. Who has a checkpoint of one is told so; nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from know_cli.kinds import Kind
from know_cli.names import Path, Shape, read_name, words

# Of a module with the vectors of a vocabulary, or with the scores of its words.
_WORDS = frozenset({"wte", "tok", "token", "tokens", "word", "words"})
_HEAD = ("lm", "head")
# Names that say nothing of words, as the whole name of a module with a matrix and nothing else.
_BARE = frozenset({"shared", "embed_in", "embeddings"})
_NO_WORDS = frozenset({"type", "position", "positions", "pos", "patch", "proj", "cls"})


def is_of_language(shapes: Mapping[str, Shape], kinds: Mapping[str, Kind]) -> bool:
    """Whether there is a table of words, or a factor of LoRA, and no convolution.

    Args:
        shapes: of every tensor of a checkpoint, by name.
        kinds: of the same.

    >>> is_of_language({"wte.weight": (50257, 768)}, {"wte.weight": Kind.FC})
    True
    >>> is_of_language({"fc1.weight": (64, 784)}, {"fc1.weight": Kind.FC})
    False
    """
    if Kind.CONV in kinds.values():
        return False
    names = {name: read_name(name) for name in shapes}
    modules: dict[Path, set[str]] = {}
    for of in names.values():
        modules.setdefault(of.path, set()).add(of.leaf)
    return any(
        len(shapes[name]) == 2
        and (_is_of_lora(of.path, of.leaf) or _is_of_words(of.path, of.leaf, modules[of.path]))
        for name, of in names.items()
        if kinds[name] is Kind.FC
    )


def _is_of_lora(path: Path, leaf: str) -> bool:
    return any("lora" in words(part) for part in (*path[-2:], leaf))


def _is_of_words(path: Path, leaf: str, siblings: Set[str]) -> bool:
    named = [part for part in path if not part.isdecimal()][-1:]
    if "bias" in siblings or not named:
        return False
    found = {word for part in (*named, leaf) for word in words(part)}
    return (
        named[0] in _BARE
        or words(named[0]) == _HEAD
        or (bool(found & _WORDS) and not found & _NO_WORDS)
    )
