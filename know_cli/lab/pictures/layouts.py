"""The layouts of data sets of pictures: which files there are, and what they show.

Nothing is decoded here, and nothing is downloaded. Each function reads a data set's own lists, or
its folders where those are the lists.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from know_cli.errors import UsageError
from know_cli.files import open_file, read_text

_MIXING = 2  # the seed
_ENDINGS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Part:
    """Training or test pictures of a data set.

    Attributes:
        pictures: ``n`` paths.
        labels: of each its class from 0, or the path of its map of classes, or its captions.
    """

    pictures: Sequence[Path]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.pictures)

    def mixed(self) -> Part:
        """The same in an order that is always the same, and tells nothing."""
        order = np.random.default_rng(_MIXING).permutation(len(self))
        return Part([self.pictures[k] for k in order], [self.labels[k] for k in order])


@dataclass(frozen=True)
class Found:
    """A data set's pictures.

    Attributes:
        train: to train on.
        test: to measure on.
        classes: their number; 0 where there are captions.
    """

    train: Part
    test: Part
    classes: int


@dataclass(frozen=True)
class PictureSet:
    """How one data set is found in a folder.

    Attributes:
        read: its parts, from its folder.
        marks: paths in the folder that tell it.
        layout: what it has to look like, for messages.
    """

    read: Callable[[Path], Found]
    marks: Sequence[str]
    layout: str


def class_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Pictures, labels and class names of a folder with a folder for each class.

    Classes are numbered in the order of their names; pictures may lie in folders of their class's.
    What is hidden, and folders without pictures, do not count.

    Raises:
        UsageError: there is none.
    """
    names: list[str] = []
    pictures: list[Path] = []
    labels: list[int] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = sorted(path for path in place.rglob("*") if _is_picture(path))
        if found and not place.name.startswith("."):
            pictures += found
            labels += [len(names)] * len(found)
            names.append(place.name)
    if not pictures:
        raise UsageError(f"{folder}: has no folders of pictures; there is to be one for each class")
    return pictures, labels, names


def _is_picture(path: Path) -> bool:
    # Systems and tools leave hidden files beside pictures, some with a picture's ending.
    return path.suffix.lower() in _ENDINGS and not path.name.startswith(".")


def train_and_val(folder: Path) -> Found:
    """``train/CLASS/…`` and ``val/CLASS/…``, as ImageNet is usually kept."""
    pictures, labels, names = class_folders(folder / "train")
    tested, test_labels, others = class_folders(folder / "val")
    if names != others:
        raise UsageError(f"{folder}: train and val have folders of different classes")
    return Found(Part(pictures, labels), Part(tested, test_labels), len(names))


def tiny_imagenet(folder: Path) -> Found:
    """``train/CLASS/images/…``, and ``val/images`` with a list."""
    pictures, labels, names = class_folders(folder / "train")
    numbers = {name: number for number, name in enumerate(names)}
    listed = folder / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in _lines(listed)]
    tested = [folder / "val" / "images" / row[0] for row in rows]
    test_labels = _looked_up(listed, numbers, [row[1] if len(row) > 1 else "" for row in rows])
    return Found(Part(pictures, labels), Part(tested, test_labels), len(names))


def stanford_cars(folder: Path) -> Found:
    """``cars_train``, ``cars_test`` and MATLAB's lists of them."""
    parts = []
    for name, listed in (
        ("cars_train", folder / "devkit" / "cars_train_annos.mat"),
        ("cars_test", folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = _matlab(listed, "annotations").ravel()
        files = [folder / name / str(row["fname"].item()) for row in rows]
        parts.append(Part(files, [int(row["class"].item()) - 1 for row in rows]))
    return Found(parts[0], parts[1], 1 + max(parts[0].labels))


def cub(folder: Path) -> Found:
    """``images`` with lists of paths, classes and parts, each line with the picture's number."""
    columns = {
        name: dict(line.split(maxsplit=1) for line in _lines(folder / f"{name}.txt"))
        for name in ("images", "image_class_labels", "train_test_split")
    }
    classes = {number: int(label) - 1 for number, label in columns["image_class_labels"].items()}
    parts: dict[str, tuple[list[Path], list[int]]] = {"1": ([], []), "0": ([], [])}
    for number, name in columns["images"].items():
        pictures, labels = parts[columns["train_test_split"][number]]
        pictures.append(folder / "images" / name)
        labels.append(classes[number])
    return Found(Part(*parts["1"]), Part(*parts["0"]), 1 + max(classes.values()))


def oxford_flowers(folder: Path) -> Found:
    """``jpg`` with MATLAB's lists of labels and parts; validation pictures are trained on, too."""
    labels = _matlab(folder / "imagelabels.mat", "labels").ravel()
    listed = folder / "setid.mat"
    trained = [*_matlab(listed, "trnid").ravel(), *_matlab(listed, "valid").ravel()]

    def part(numbers: Sequence[Any]) -> Part:
        return Part(
            [folder / "jpg" / f"image_{int(number):05d}.jpg" for number in numbers],
            [int(labels[int(number) - 1]) - 1 for number in numbers],
        )

    tested = _matlab(listed, "tstid").ravel()
    return Found(part(trained), part(tested), int(labels.max()))


def voc(folder: Path) -> Found:
    """``VOC2012`` with lists of the pictures whose pixels have classes, 20 and the background."""
    base = folder / "VOCdevkit" / "VOC2012"

    def part(name: str) -> Part:
        names = _lines(base / "ImageSets" / "Segmentation" / f"{name}.txt")
        return Part(
            [base / "JPEGImages" / f"{one}.jpg" for one in names],
            [base / "SegmentationClass" / f"{one}.png" for one in names],
        )

    return Found(part("train"), part("val"), 21)


def cityscapes(folder: Path) -> Found:
    """``leftImg8bit/PART/CITY/…`` and the finely labelled ``gtFine``."""

    def part(name: str) -> Part:
        pictures = sorted((folder / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
        maps = [
            folder / "gtFine" / name / path.parent.name
            / path.name.replace("_leftImg8bit", "_gtFine_labelIds")
            for path in pictures
        ]  # fmt: skip
        return Part(pictures, maps)

    return Found(part("train"), part("val"), 19)


def flickr8k(folder: Path) -> Found:
    """``Images`` and ``captions.txt``; of the pictures in the order of their names the last 1,000.

    The official lists of parts come with another distribution; here a seventh at most is tested.
    """
    captions: dict[str, list[str]] = {}
    listed = folder / "captions.txt"
    try:
        rows = list(csv.reader(io.StringIO(read_text(listed)), strict=True))
    except csv.Error as error:
        raise UsageError(f"{listed}: cannot be read ({error}); get it again") from error
    for row in rows[1:]:  # the first has the names of the columns
        if len(row) < 2:
            raise UsageError(f"{listed}: a line has no caption; get it again")
        captions.setdefault(row[0], []).append(",".join(row[1:]))
    names = sorted(captions)
    tested = min(1000, len(names) // 7 or 1)

    def part(of: Sequence[str]) -> Part:
        return Part([folder / "Images" / name for name in of], [captions[name] for name in of])

    return Found(part(names[:-tested]), part(names[-tested:]), 0)


def domains(folder: Path, names: Sequence[str]) -> Mapping[str, Part]:
    """``DOMAIN/CLASS/…`` by domain, as PACS is kept; all domains have the same classes.

    Args:
        folder: of the data set.
        names: of its domains.

    Raises:
        UsageError: they differ.
    """
    parts: dict[str, Part] = {}
    first: list[str] = []
    for domain in names:
        pictures, labels, classes = class_folders(folder / domain)
        first = first or classes
        if classes != first:
            raise UsageError(f"{folder / domain}: has folders of other classes than {names[0]}")
        parts[domain] = Part(pictures, labels)
    return parts


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _looked_up(path: Path, numbers: Mapping[str, int], names: Sequence[str]) -> list[int]:
    for name in names:
        if name not in numbers:
            raise UsageError(f"{path}: names the class {name!r}, which train has no folder of")
    return [numbers[name] for name in names]


def _matlab(path: Path, name: str) -> Any:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise UsageError(
            f"{path}: MATLAB's files need scipy: pip install 'know-predict[paper]'"
        ) from error
    try:
        with open_file(path) as file:
            return loadmat(file)[name]
    except (MatReadError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UsageError(f"{path}: cannot be read ({error!r}); get it again") from error
