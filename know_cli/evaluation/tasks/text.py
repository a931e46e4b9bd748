"""Text: transfers a small character-level language model between corpora, whole or by adapters.

The corpora are always available, and no data set of meta-training contains them: Python's
reference manual in English, as its interactive help shows it, and the source code of modules of
the standard library. They differ slightly between versions of Python.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.tasks.measures import LOG_LIKELIHOOD
from know_cli.evaluation.tasks.networks import LanguageModel, add_lora, seeded
from know_cli.evaluation.tasks.task import (
    Cell,
    Downstream,
    Problem,
    Recipe,
    Task,
    permutation,
    train,
)
from know_cli.files import read_text
from know_cli.forgetting.recorder import derived_seed

_LENGTH = 48
# The first token stands for everything but printable ASCII and line feeds.
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_VOCABULARY = len(_CHARACTERS) + 1
MANUAL = "manual"
# Modules that meta-training does not use, each a single file in all supported versions.
_CODE = {
    "code": ("ast", "datetime", "difflib", "doctest", "mailbox", "optparse", "pickle", "zipfile"),
    "other code": ("_pydatetime", "codecs", "fractions", "heapq", "pdb", "statistics", "uuid"),
}
_BASE, _POOL, _TARGET, _BASE_ORDER = range(30, 34)
_BASE_RECIPE = Recipe(10, 3e-3, batch_size=16, schedule="cosine")


def _source(corpus: str) -> str:
    if corpus == MANUAL:
        from pydoc_data.topics import topics

        return "\n".join(text for _, text in sorted(topics.items()))
    folder = Path(os.__file__).parent
    files = [folder / f"{module}.py" for module in _CODE[corpus]]
    # Some are packages in some versions of Python.
    return "\n".join(read_text(file) for file in files if file.is_file())


@cache
def load_passages(corpus: str) -> Tensor:
    """The passages of a corpus.

    Args:
        corpus: ``manual``, ``code`` or ``other code``.

    Returns:
        Tokens ``[n, 49]`` int64, one more than networks read, without duplicate passages.
    """
    tokens = {character: number for number, character in enumerate(_CHARACTERS, 1)}
    lines = (line.rstrip() for line in _source(corpus).splitlines())
    text = "\n".join(line for line in lines if line)
    size = _LENGTH + 1
    passages = dict.fromkeys(
        text[start : start + size] for start in range(0, len(text) - size + 1, size)
    )
    return torch.tensor([[tokens.get(sign, 0) for sign in passage] for passage in passages])


def _examples(passages: Tensor) -> Examples:
    """Examples in which every token but the first is predicted from those before it."""
    return Examples(passages[:, :-1].contiguous(), passages[:, 1:].contiguous())


@dataclass(frozen=True)
class Text(Task):
    """Transfer of a language model from one corpus to another.

    Attributes:
        source: corpus of the pre-training.
        target: corpus of the fine-tuning.
        width: features per token.
        heads: of the attention.
        depth: number of blocks.
    """

    source: str = MANUAL
    target: str = "code"
    width: int = 32
    heads: int = 2
    depth: int = 2

    @property
    def data_sets(self) -> tuple[str, ...]:
        """No data sets, since the corpora are part of Python."""
        return ()

    def prepare(self, seed: int, data_folder: Path | None) -> Problem:
        """Draw passages."""
        pool, test = self._split(self.source, self.largest, seed, _POOL)
        most = max(downstream.size for downstream in self.downstream)
        train, measured = self._split(self.target, 2 * most, seed, _TARGET)
        build = self._builder(seed)
        return Problem(
            pool=pool,
            test=test,
            build=build,
            build_downstream=build,
            fresh=(),
            cells=tuple(
                Cell(f"{downstream.size} passages", downstream, train, measured)
                for downstream in self.downstream
            ),
            pretraining_measure=LOG_LIKELIHOOD,
            measure=LOG_LIKELIHOOD,
        )

    def _split(self, corpus: str, count: int, seed: int, stream: int) -> tuple[Examples, Examples]:
        passages = load_passages(corpus)
        if len(passages) < count + self.tested:
            raise UsageError(
                f"task {self.name}: needs {count + self.tested} passages, this Python's {corpus} "
                f"has {len(passages)}"
            )
        order = permutation(len(passages), seed, stream)
        train, test = order[:count], order[count : count + self.tested]
        return _examples(passages[train]), _examples(passages[test])

    def _model(self) -> LanguageModel:
        return LanguageModel(_VOCABULARY, _LENGTH, self.width, self.heads, self.depth)

    def _builder(self, seed: int) -> Callable[[int], nn.Module]:
        return lambda number: seeded(self._model, number)


@dataclass(frozen=True)
class Lora(Text):
    """Transfer of a frozen language model's adapters from one corpus to another.

    Attributes:
        base: corpus that the language model is trained on first.
        base_samples: number of its passages to train on.
        base_recipe: of that training.
        rank: of the adapters.
    """

    base: str = MANUAL
    base_samples: int = 1500
    base_recipe: Recipe = _BASE_RECIPE
    rank: int = 4

    def _builder(self, seed: int) -> Callable[[int], nn.Module]:
        @cache
        def base() -> LanguageModel:
            model = seeded(self._model, derived_seed(seed, _BASE))
            assert isinstance(model, LanguageModel)
            passages = load_passages(self.base)
            chosen = passages[permutation(len(passages), seed, _BASE_ORDER)[: self.base_samples]]
            order = derived_seed(seed, _BASE_ORDER)
            train(model, _examples(chosen), self.base_recipe, order)
            return model

        def adapted() -> nn.Module:
            model = copy.deepcopy(base())
            add_lora(model, self.rank)
            return model

        return lambda number: seeded(adapted, number)


_DOWNSTREAM = (
    Downstream(20, 16, 2e-3, repetitions=1),
    Downstream(80, 10, 2e-3, repetitions=1),
)

TASKS = (
    Text(
        name="text-language-model",
        title="a language model of Python's manual to source code",
        samples=600,
        recipe=Recipe(20, 3e-3, batch_size=16, weight_decay=0.1),
        downstream=(
            Downstream(20, 16, 1e-3, repetitions=1),
            Downstream(80, 10, 2e-3, repetitions=1),
        ),
        tested=400,
    ),
    Text(
        name="text-decoder",
        title="a language model of three million parameters of Python's manual to source code",
        samples=600,
        recipe=Recipe(20, 1e-3, batch_size=16, weight_decay=0.1),
        downstream=(
            Downstream(20, 16, 5e-4, repetitions=1),
            Downstream(80, 10, 5e-4, repetitions=1),
        ),
        tested=400,
        large=True,
        width=256,
        heads=8,
        depth=4,
    ),
    Lora(
        name="text-lora",
        title="adapters of a frozen language model, from source code to other source code",
        samples=240,
        recipe=Recipe(40, 5e-3, batch_size=16),
        downstream=_DOWNSTREAM,
        tested=400,
        source="code",
        target="other code",
    ),
)
