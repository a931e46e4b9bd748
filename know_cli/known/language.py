"""Whether a checkpoint is of a language model, or of an adapter, by its tensors' names and shapes.

On such, of all that was measured (docs/expectations.md), the shipped default is a worse start than
Θ0. Who has a checkpoint of one is told so; nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from know_cli.kinds import Kind, classify_all
from know_cli.names import Path, Shape, words
from know_cli.structure import find_facts

# Of a module with the vectors of a vocabulary, or with the scores of its words.
_WORDS = frozenset({"wte", "tok", "token", "tokens", "word", "words"})
_HEAD = ("lm", "head")
# Names that say nothing of words, as the whole name of a module with a matrix and nothing else.
_BARE = frozenset({"shared", "embed_in", "embeddings"})
_NO_WORDS = frozenset({"type", "position", "positions", "pos", "patch", "proj", "cls"})


def is_of_language(tensors: Mapping[str, tuple[Shape, str]]) -> bool:
    """Whether there is a table of words, or a factor of LoRA, and no convolution.

    Args:
        tensors: name → (shape, safetensors dtype).

    >>> is_of_language({"wte.weight": ((50257, 768), "F32"), "h.0.mlp.weight": ((768, 768), "F32")})
    True
    >>> is_of_language({"fc1.weight": ((64, 784), "F32"), "fc2.weight": ((10, 64), "F32")})
    False
    """
    kinds = {name: found.kind for name, found in classify_all(tensors).items()}
    if Kind.CONV in kinds.values():
        return False
    facts = find_facts(tensors)
    modules: dict[Path, set[str]] = {}
    for of in facts.values():
        modules.setdefault(of.path, set()).add(of.leaf)
    return any(
        len(tensors[name][0]) == 2
        and (_is_of_lora(of.path, of.leaf) or _is_of_words(of.path, of.leaf, modules[of.path]))
        for name, of in facts.items()
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
