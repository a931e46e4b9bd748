"""Results on disk, each under a hash of all that decides it."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from know_cli.engine.reading import as_bytes
from know_cli.errors import OutputError
from know_cli.files import lock, make_folder, write_text

# Folders of the package whose code decides what is predicted from checkpoints.
_PREDICTING = (
    *("checkpoints", "engine", "hypermodel", "methods"),
    *("behaviour.py", "kinds.py", "structure.py", "normalisation.py", "sources.py", "pairs.py"),
    *("roles.py", "names.py"),
)
_DIGITS = 16
_LOCK = ".lock"


def key(*facts: Any) -> str:
    """A hash of JSON values, as hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def tensors_key(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor.detach().contiguous()))
    return digest.hexdigest()[:_DIGITS]


@cache
def code_key() -> str:
    """A hash of the source code that predicts, so that no result outlives a change of it."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for entry in _PREDICTING:
        place = package / entry
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(package).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:_DIGITS]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, waiting for them first.

    The folder is made if it is missing. Where the file system has no locks, nobody is kept out.

    Raises:
        OutputError: the folder cannot be written.
    """
    make_folder(folder)
    path = folder / _LOCK
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("w"))
            lock(file.fileno(), fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        yield


def read(path: Path) -> dict[str, Any] | None:
    """What was written under a path; None if nothing was, or what is there is no such result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found if isinstance(found, dict) else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Keep a result; its folder is made if it is missing.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    write_text(path, json.dumps(content) + "\n")
