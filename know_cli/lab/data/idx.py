"""MNIST and Fashion-MNIST from IDX files, the format in which they are distributed.

An IDX file is a magic number (two zero bytes, the type of the values, the number of
dimensions), the dimensions as big-endian 32-bit integers, and the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from know_cli.errors import UsageError, counted
from know_cli.files import open_file
from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders, Source, missing

_UNSIGNED_BYTE = 0x08
_SIDE = 28
_CLASSES = 10
# Far more than any such set has; a corrupt header must not claim terabytes.
_MOST_SAMPLES = 1_000_000
_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
# Both sets use the same file names, so their first training labels tell them apart: a folder that
# holds one of them must not be taken for the other.
_FIRST_LABELS = {
    "mnist": bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9]),
    "fashion-mnist": bytes([9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 0, 6, 4]),
}
_LABELS_OFFSET = 8
_REMEDIES = {
    "mnist": "from the set's distributors",
    "fashion-mnist": (
        "from Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist), or "
        "from github.com/zalandoresearch/fashion-mnist"
    ),
}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes, plain or, if its name ends in ``.gz``, compressed.

    Args:
        path: the file.
        dimensions: the number that the file must have.

    Returns:
        The values, uint8, in the shape that the header states.

    Raises:
        UsageError: the file cannot be read, is not an IDX file of unsigned bytes with that number
            of dimensions, or is longer or shorter than its header states.
    """
    try:
        with _open(path) as stream:
            magic = stream.read(4)
            if magic != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
                raise UsageError(
                    f"{path}: starts with {magic.hex(' ') or 'nothing'}, not as an IDX file of "
                    f"unsigned bytes in {dimensions} dimensions (00 00 08 {dimensions:02x}); "
                    "get the file again"
                )
            header = stream.read(4 * dimensions)
            if len(header) < 4 * dimensions:
                raise UsageError(f"{path}: ends within its header; get the file again")
            shape = [int(size) for size in np.frombuffer(header, ">u4")]
            expected = math.prod(shape)
            if not 0 < expected <= _MOST_SAMPLES * _SIDE**2:
                raise UsageError(
                    f"{path}: its header states impossible dimensions, "
                    f"{' × '.join(map(str, shape))}; get the file again"
                )
            content = stream.read(expected)
            more = bool(stream.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error}); get the file again") from error
    if len(content) < expected or more:
        found = "more" if more else str(len(content))
        raise UsageError(
            f"{path}: {' × '.join(map(str, shape))} values need {expected} bytes, but {found} "
            "follow the header; get the file again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    with open_file(path) as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as inner:
                yield inner
        else:
            yield file


def _file(folder: Path, name: str) -> Path | None:
    """A folder's file under any of its usual names; uncompressed files take precedence."""
    dotted = name.replace("-idx", ".idx")
    for spelling in (f"{name}-ubyte", f"{dotted}-ubyte"):
        for suffix in ("", ".gz"):
            path = folder / (spelling + suffix)
            if path.is_file():
                return path
    return None


def _is_other(name: str, labels: Path) -> bool:
    try:
        with _open(labels) as stream:
            start = stream.read(_LABELS_OFFSET + len(_FIRST_LABELS[name]))[_LABELS_OFFSET:]
    except (OSError, EOFError, zlib.error):
        return False  # Reading it later says what is wrong.
    return any(start == first for other, first in _FIRST_LABELS.items() if other != name)


def _find(name: str, folders: Folders) -> dict[str, Path] | None:
    """The four files of the first folder that has all of them."""
    for folder in folders:
        found = {file: path for file in _FILES if (path := _file(folder, file))}
        if len(found) == len(_FILES) and not _is_other(name, found["train-labels-idx1"]):
            return found
    return None


def _samples(images_path: Path, labels_path: Path) -> Samples:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise UsageError(
            f"{images_path}: images of {images.shape[1]} × {images.shape[2]} pixels, not "
            f"{_SIDE} × {_SIDE}; get the file again"
        )
    if len(images) != len(labels):
        raise UsageError(
            f"{labels_path}: {counted(len(labels), 'label')} for the "
            f"{counted(len(images), 'image')} of "
            f"{images_path.name}; get both again, from the same place"
        )
    if labels.max() >= _CLASSES:
        raise UsageError(
            f"{labels_path}: has label {labels.max()}, but only 0 to {_CLASSES - 1} exist; "
            "get the file again"
        )
    return Samples(
        torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
    )


def _read(name: str, folders: Folders) -> DataSet:
    found = _find(name, folders)
    if found is None:
        files = ", ".join(f"{file}-ubyte.gz" for file in _FILES)
        raise missing(
            name, folders, f"put {files} (or without .gz) into one of them, {_REMEDIES[name]}"
        )
    train, test = (
        _samples(found[f"{part}-images-idx3"], found[f"{part}-labels-idx1"])
        for part in ("train", "t10k")
    )
    return DataSet(name, "image", train, test, _CLASSES)


def _source(name: str) -> Source:
    return Source(partial(_read, name), lambda folders: _find(name, folders) is not None)


MNIST = _source("mnist")
FASHION_MNIST = _source("fashion-mnist")
