"""The data sets of pictures by name. To add one, write its layout and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from know_cli.errors import UsageError
from know_cli.lab.pictures import layouts
from know_cli.lab.pictures.layouts import Found, Part, PictureSet

Read = TypeVar("Read")

PICTURE_SETS: dict[str, PictureSet] = {
    "imagenet-100": PictureSet(
        layouts.train_and_val, ("train", "val"), "train/CLASS/*.JPEG and val/CLASS/*.JPEG"
    ),
    "tiny-imagenet-200": PictureSet(
        layouts.tiny_imagenet,
        ("train", "val/val_annotations.txt"),
        "train/CLASS/images and val with val_annotations.txt",
    ),
    "stanford-cars": PictureSet(
        layouts.stanford_cars,
        ("cars_train", "cars_test", "devkit/cars_train_annos.mat"),
        "cars_train, cars_test, devkit and cars_test_annos_withlabels.mat",
    ),
    "CUB_200_2011": PictureSet(
        layouts.cub, ("images", "images.txt", "train_test_split.txt"), "images and images.txt, …"
    ),
    "flowers-102": PictureSet(
        layouts.oxford_flowers,
        ("jpg", "imagelabels.mat", "setid.mat"),
        "jpg, imagelabels.mat and setid.mat",
    ),
    "VOC2012": PictureSet(
        layouts.voc,
        ("VOCdevkit/VOC2012/SegmentationClass",),
        "VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets",
    ),
    "cityscapes": PictureSet(
        layouts.cityscapes, ("leftImg8bit", "gtFine"), "leftImg8bit and gtFine"
    ),
    "flickr8k": PictureSet(layouts.flickr8k, ("Images", "captions.txt"), "Images and captions.txt"),
}
#: Its parts are domains, of which a task leaves one out.
PACS = "PACS"
_PACS_DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


def found_pictures(data_folder: Path | None) -> list[str]:
    """Sorted names of the data sets that are in a folder of data sets, each in one of its name."""
    marks = {name: one.marks for name, one in PICTURE_SETS.items()} | {PACS: _PACS_DOMAINS}
    if data_folder is None:
        return []
    return sorted(
        name for name, of in marks.items() if all((data_folder / name / m).exists() for m in of)
    )


def find_pictures(name: str, data_folder: Path | None) -> Found:
    """The pictures of a data set; none is decoded.

    Raises:
        UsageError: it is not there, or a list of it cannot be read.
    """
    one = PICTURE_SETS[name]
    return _read(name, data_folder, one.layout, one.read)


def find_domains(data_folder: Path | None) -> dict[str, Part]:
    """The pictures of PACS, by domain.

    Raises:
        UsageError: it is not there, or its domains have different classes.
    """
    layout = "a folder for each domain, with one for each class"
    return dict(
        _read(PACS, data_folder, layout, lambda folder: layouts.domains(folder, _PACS_DOMAINS))
    )


def _read(name: str, data_folder: Path | None, layout: str, read: Callable[[Path], Read]) -> Read:
    if name not in found_pictures(data_folder):
        raise UsageError(f"data set {name!r}: not in {data_folder}; its folder has {layout}")
    assert data_folder is not None
    folder = data_folder / name
    try:
        return read(folder)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"{folder}: cannot be read ({type(error).__name__}: {error}); its folder has {layout}"
        ) from error
