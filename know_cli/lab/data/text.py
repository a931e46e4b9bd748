r"""Passages of text, to be classified by the document that they come from.

The corpus is a folder ``text``, in which each ``*.txt`` file, and each sub-folder with such
files, is a class. Without one it is the source text of Python's standard library, which is always
available: code, comments and documentation of twelve modules. It differs slightly between
versions of Python.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from know_cli.errors import UsageError
from know_cli.files import read_text
from know_cli.lab.data.augmentations import UNKNOWN_TOKEN
from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders, Source

_NAME = "text"
_LENGTH = 64
_VOCABULARY = 100
_MOST_TRAIN, _MOST_TEST = 500, 150
_FEWEST_PASSAGES = 20
_SPLIT_SEED = 64
# Modules that all supported versions of Python have, with enough text each and no tables.
_MODULES = (
    "_pydecimal", "argparse", "asyncio", "email", "http", "importlib", "inspect", "logging",
    "multiprocessing", "tarfile", "typing", "unittest",
)  # fmt: skip

_Documents = dict[str, list[Path]]


def _standard_library() -> _Documents:
    """Source files of the chosen modules and packages, without tests."""
    folder = Path(os.__file__).parent
    found = {}
    for module in _MODULES:
        package = folder / module
        files = [folder / f"{module}.py", *sorted(package.rglob("*.py"))]
        kept = [
            path
            for path in files
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(folder).parts)
        ]
        if kept:
            found[module] = kept
    return found


def _documents(folders: Folders) -> tuple[Path, _Documents]:
    """The corpus's folder, and the files of each class, ordered by name."""
    for folder in folders:
        # A folder of other data sets may contain stray text files; only one that is
        # named like this is taken for a corpus.
        if folder.name == _NAME and folder.is_dir():
            return folder, {
                entry.name: files
                for entry in sorted(folder.iterdir())
                if (files := [entry] if entry.is_file() else sorted(entry.rglob("*.txt")))
                and all(path.suffix == ".txt" for path in files)
            }
    return Path(os.__file__).parent, _standard_library()


def _passages(files: Sequence[Path]) -> list[str]:
    """The text cut into passages, in order, with runs of white space collapsed."""
    try:
        whole = "\n".join(read_text(path, errors="replace") for path in files)
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error
    dense = re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", whole)).strip()
    starts = range(0, len(dense) - _LENGTH + 1, _LENGTH)
    return [dense[start : start + _LENGTH] for start in starts]


def _distinct(documents: _Documents) -> dict[str, list[str]]:
    """Passages of each class, without those that occurred before, such as licence notices."""
    seen: set[str] = set()
    distinct = {}
    for name, files in documents.items():
        distinct[name] = [
            passage
            for passage in _passages(files)
            if passage not in seen and not seen.add(passage)  # type: ignore[func-returns-value]
        ]
    return distinct


def _encoded(passages: Sequence[str], tokens: dict[str, int]) -> torch.Tensor:
    return torch.tensor(
        [[tokens.get(character, UNKNOWN_TOKEN) for character in passage] for passage in passages]
    )


def _read(folders: Folders) -> DataSet:
    place, documents = _documents(folders)
    distinct = _distinct(documents)
    remedy = (
        f"a corpus is a folder {_NAME} with at least two *.txt files, or sub-folders of such "
        "files, each of them one class"
    )
    if len(distinct) < 2:
        raise UsageError(f"{place}: has {len(distinct)} documents to tell apart; {remedy}")
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, (name, passages) in enumerate(distinct.items()):
        if len(passages) < _FEWEST_PASSAGES:
            raise UsageError(
                f"{place / name}: has {len(passages)} different passages of {_LENGTH} "
                f"characters, but {_FEWEST_PASSAGES} are needed; remove the document or make "
                "it longer"
            )
        order = np.random.default_rng([_SPLIT_SEED, label]).permutation(len(passages))
        tested = min(_MOST_TEST, round(len(order) * _MOST_TEST / (_MOST_TRAIN + _MOST_TEST)))
        test += [(passages[index], label) for index in order[:tested]]
        train += [(passages[index], label) for index in order[tested:][:_MOST_TRAIN]]
    # The most frequent characters of the training passages, in whatever language.
    counts = Counter("".join(passage for passage, _ in train))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    tokens = {
        character: number
        for number, character in enumerate(frequent[: _VOCABULARY - 1], UNKNOWN_TOKEN + 1)
    }
    parts = []
    for number, chosen in enumerate((train, test)):
        order = np.random.default_rng([_SPLIT_SEED, len(distinct), number]).permutation(len(chosen))
        inputs = _encoded([chosen[index][0] for index in order], tokens)
        parts.append(Samples(inputs, torch.tensor([chosen[index][1] for index in order])))
    return DataSet(_NAME, "text", parts[0], parts[1], len(distinct), _VOCABULARY)


TEXT = Source(_read, lambda folders: len(_documents(folders)[1]) > 1)
