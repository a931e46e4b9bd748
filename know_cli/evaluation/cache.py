"""Results on disk, each under a hash of everything that determines it."""

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

from know_cli.checkpoints.reading import as_bytes
from know_cli.errors import OutputError
from know_cli.files import lock, make_folder, open_own, read_bytes, read_text, write_text
from know_cli.methods.registry import METHODS

_HYPER_MODELS = sorted({method.hyper_model for method in METHODS if method.hyper_model})
# The parts of the package whose code determines predictions.
_PREDICTING = (
    "prediction", "methods", *_HYPER_MODELS, "engine", "passes", "ranks", "checkpoints", "files",
    "behaviour.py", "kinds.py", "structure.py", "normalisation.py", "sources.py", "pairs.py",
    "roles.py", "optimisers.py", "names.py", "errors.py",
)  # fmt: skip
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
    """A hash of the source code that predicts, so no result outlives a change of that code."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for entry in _PREDICTING:
        place = package / entry
        for file in _sources(place):
            digest.update(file.relative_to(package).as_posix().encode())
            digest.update(read_bytes(file))
    return digest.hexdigest()[:_DIGITS]


def _sources(place: Path) -> list[Path]:
    """The files of source code in a folder, or the file itself."""
    if not place.is_dir():
        return [place]
    return sorted(file for file in place.rglob("*") if file.suffix in (".py", ".c"))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, waiting while another process holds it.

    The folder is created if it is missing. A file system without locks excludes no one.

    Raises:
        OutputError: the folder cannot be written.
    """
    make_folder(folder)
    path = folder / _LOCK
    with ExitStack() as stack:
        try:
            file = open_own(path, "lock", mode=0o666)
            stack.callback(file.close)
            lock(file.descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        yield


def read(path: Path) -> dict[str, Any] | None:
    """Read a result; None if there is none, or the file is not a JSON object.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        found = json.loads(read_text(path))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found if isinstance(found, dict) else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result; its folder is created if it is missing.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    write_text(path, json.dumps(content) + "\n", replace=True)
