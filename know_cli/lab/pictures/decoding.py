"""Pictures from files to tensors: cropped to the wanted shape, in main memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from know_cli.errors import UsageError
from know_cli.files import open_file

if TYPE_CHECKING:
    from PIL.Image import Image

#: No other of Pillow's many decoders has to be trusted with a file.
FORMATS = ("JPEG", "PNG")
#: Position that does not count, as cross entropy has it.
IGNORED = -100


def decoded_pictures(paths: Sequence[Path], height: int, width: int) -> Tensor:
    """Read pictures, in colours, cropped in the middle and reduced to one shape.

    Args:
        paths: of JPEG and PNG files.
        height: of the result, in pixels.
        width: likewise.

    Returns:
        ``[n, 3, height, width]`` uint8.

    Raises:
        UsageError: Pillow is not installed, or a file cannot be read.
    """
    fit = _fit()

    def fitted(picture: Image) -> Tensor:
        return _pixels(fit(picture.convert("RGB"), (width, height))).permute(2, 0, 1)

    every = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    _fill(every, paths, fitted)
    return every


def decoded_classes(
    paths: Sequence[Path], height: int, width: int, classes: Sequence[int]
) -> Tensor:
    """Read maps of classes, cropped like the pictures that they belong to.

    Args:
        paths: of PNG files whose pixels are numbers: greyscale, or indices into a palette.
        height: of the result, in pixels.
        width: likewise.
        classes: the class of each of the 256 numbers; :data:`IGNORED` where it does not count.

    Returns:
        ``[n, height, width]`` int64.

    Raises:
        UsageError: Pillow is not installed, a file cannot be read, or it has no such pixels.
    """
    fit = _fit()
    from PIL.Image import Resampling

    table = torch.tensor(list(classes))

    def fitted(picture: Image) -> Tensor:
        if picture.mode not in ("L", "P"):
            raise ValueError(f"its mode is {picture.mode}, not L or P")
        # A class between two others would be neither.
        cropped = fit(picture, (width, height), Resampling.NEAREST)
        return table[_pixels(cropped).long()]

    every = torch.empty(len(paths), height, width, dtype=torch.int64)
    _fill(every, paths, fitted)
    return every


def _fill(every: Tensor, paths: Sequence[Path], read: Callable[[Image], Tensor]) -> None:
    """Decode into the rows of a tensor, several files at once: Pillow works without the lock."""

    def one(number: int) -> None:
        every[number] = _read(paths[number], read)

    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        # list() raises what a thread raised.
        list(executor.map(one, range(len(paths))))


def _fit() -> Callable[..., Image]:
    """Pillow's function that crops a picture in the middle and scales it."""
    try:
        from PIL import ImageOps
    except ImportError as error:
        raise UsageError("pictures need Pillow: pip install 'know-predict[paper]'") from error
    return ImageOps.fit


def _read(path: Path, read: Callable[[Image], Tensor]) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with open_file(path) as file, Image.open(file, formats=FORMATS) as picture:
            return read(picture)
    except (
        OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise UsageError(f"{path}: cannot be read ({error}); get it again") from error


def _pixels(picture: Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture))
