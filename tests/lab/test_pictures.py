"""Data sets of pictures: their layouts, golden against what was written, and broken ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from know_cli.errors import UsageError
from know_cli.lab.pictures import (
    PICTURE_SETS,
    decoded_classes,
    decoded_pictures,
    find_pictures,
    found_pictures,
)
from know_cli.lab.pictures.decoding import IGNORED
from know_cli.lab.pictures.registry import find_domains
from tests.support import picture_sets
from tests.support.picture_sets import HEIGHT, WIDTH, WRITERS


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_is_found_when_it_is_there(name: str, tmp_path: Path) -> None:
    assert found_pictures(tmp_path) == found_pictures(None) == []
    WRITERS[name](tmp_path / name, 4)
    assert found_pictures(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("imagenet-100", [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], 2),
        ("tiny-imagenet-200", [0, 0, 0, 0, 1, 1, 1, 1], [1, 0], 2),
        ("stanford-cars", [0, 1, 0, 1], [0, 1, 0, 1], 2),
        ("CUB_200_2011", [0, 1, 0, 1], [0, 1, 0, 1], 2),
        ("flowers-102", [1, 0, 1, 0], [1, 0, 1, 0], 2),
    ],
)
def test_every_picture_has_its_class(
    name: str, train: list[int], test: list[int], classes: int, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / name, 4)
    found = find_pictures(name, tmp_path)
    assert (list(found.train.labels), list(found.test.labels)) == (train, test)
    assert found.classes == classes
    paths = [*found.train.pictures, *found.test.pictures]
    assert len(set(paths)) == len(paths) == len(train) + len(test)
    assert all(path.is_file() for path in paths)


def test_maps_captions_and_domains(tmp_path: Path) -> None:
    for name in ("VOC2012", "cityscapes", "flickr8k", "PACS"):
        WRITERS[name](tmp_path / name, 6)
    for name, classes in (("VOC2012", 21), ("cityscapes", 19)):
        found = find_pictures(name, tmp_path)
        assert (len(found.train), len(found.test), found.classes) == (6, 2, classes)
        assert all(path.is_file() for path in [*found.train.pictures, *found.train.labels])
    captions = find_pictures("flickr8k", tmp_path)
    assert (len(captions.train), len(captions.test)) == (5, 1)
    assert captions.train.labels[0] == ["A dog runs .", "A cat, a dog ."]
    domains = find_domains(tmp_path)
    assert list(domains) == ["art_painting", "cartoon", "photo", "sketch"]
    assert list(domains["photo"].labels) == [0, 0, 0, 1, 1, 1]


def test_pictures_are_cropped_in_the_middle_and_scaled(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:4] = (10, 20, 30)
    pixels[:, 4:6] = (110, 120, 130)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grey = np.full((4, 4), 7, np.uint8)
    Image.fromarray(grey).save(tmp_path / "b.png")
    found = decoded_pictures([tmp_path / "a.png", tmp_path / "b.png"], 4, 4)
    assert found.shape == (2, 3, 4, 4)
    assert found.dtype == torch.uint8
    assert found[0, 0, 0].tolist() == [10, 10, 110, 110]  # the outer quarters are cut off
    assert found[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (found[1] == 7).all()


def test_classes_are_not_mixed_by_scaling(tmp_path: Path) -> None:
    for palette in (False, True):
        path = tmp_path / f"{palette}.png"
        picture_sets.class_map(path, [0, 255, 20], palette)
        table = [*range(21), *[IGNORED] * 235]
        (found,) = decoded_classes([path], HEIGHT // 2, WIDTH // 2, table)
        assert found.dtype == torch.int64
        assert found.shape == (HEIGHT // 2, WIDTH // 2)
        assert set(found.flatten().tolist()) == {0, IGNORED, 20}


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(UsageError, match=r"broken\.jpg: cannot be read"):
        decoded_pictures([broken], 4, 4)
    picture_sets.picture(tmp_path / "colours.png", 9)
    with pytest.raises(UsageError, match=r"colours\.png: cannot be read \(its mode is RGB"):
        decoded_classes([tmp_path / "colours.png"], 4, 4, [0] * 256)
    (tmp_path / "gif.png").write_bytes(b"GIF89a")  # of Pillow's decoders two are used
    with pytest.raises(UsageError, match=r"gif\.png: cannot be read"):
        decoded_pictures([tmp_path / "gif.png"], 4, 4)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for read in (
        lambda: decoded_pictures([broken], 4, 4),
        lambda: decoded_classes([broken], 4, 4, [0] * 256),
    ):
        with pytest.raises(UsageError, match=r"pictures need Pillow: pip install 'know-pr"):
            read()


def test_broken_layouts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"data set 'flickr8k': not in .*; its folder has Images"):
        find_pictures("flickr8k", tmp_path)
    for name in WRITERS:
        WRITERS[name](tmp_path / name, 4)
    (tmp_path / "flickr8k" / "captions.txt").write_text("image,caption\nonly-a-name\n")
    with pytest.raises(UsageError, match=r"captions\.txt: a line has no caption"):
        find_pictures("flickr8k", tmp_path)
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn99999999\n")
    with pytest.raises(UsageError, match=r"names the class 'n99999999', which train has no"):
        find_pictures("tiny-imagenet-200", tmp_path)
    (tmp_path / "imagenet-100" / "val" / "n01443537").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="train and val have folders of different classes"):
        find_pictures("imagenet-100", tmp_path)
    (tmp_path / "PACS" / "photo" / "cat").rename(tmp_path / "PACS" / "photo" / "cow")
    with pytest.raises(UsageError, match="photo: has folders of other classes"):
        find_domains(tmp_path)
    (tmp_path / "flowers-102" / "setid.mat").write_bytes(b"no MATLAB")
    with pytest.raises(UsageError, match=r"setid\.mat: cannot be read"):
        find_pictures("flowers-102", tmp_path)
    (tmp_path / "CUB_200_2011" / "images.txt").write_text("1\n")
    with pytest.raises(UsageError, match=r"CUB_200_2011: cannot be read \(ValueError"):
        find_pictures("CUB_200_2011", tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UsageError, match="MATLAB's files need scipy"):
        find_pictures("stanford-cars", tmp_path)


def test_what_lies_beside_pictures_does_not_count(tmp_path: Path) -> None:
    for name in ("imagenet-100", "PACS"):
        WRITERS[name](tmp_path / name, 4)
    train = tmp_path / "imagenet-100" / "train"
    before = find_pictures("imagenet-100", tmp_path)
    picture_sets.picture(train / ".cache" / "a.jpg", 1)
    (train / "empty").mkdir()
    picture_sets.picture(train / "n01440764" / "._hidden.jpg", 1)
    assert find_pictures("imagenet-100", tmp_path) == before
    domains = find_domains(tmp_path)
    (tmp_path / "PACS" / "splits").mkdir()
    assert find_domains(tmp_path) == domains


@pytest.mark.parametrize("line", ['1.jpg,"never closed\n', f"1.jpg,{'x' * 140_000}\n"])
def test_captions_that_are_no_table_are_refused(line: str, tmp_path: Path) -> None:
    WRITERS["flickr8k"](tmp_path / "flickr8k", 4)
    with (tmp_path / "flickr8k" / "captions.txt").open("a") as file:
        file.write(line)
    with pytest.raises(UsageError, match=r"captions\.txt: cannot be read"):
        find_pictures("flickr8k", tmp_path)


def test_mixed_pictures_keep_their_labels(tmp_path: Path) -> None:
    WRITERS["imagenet-100"](tmp_path / "imagenet-100", 8)
    part = find_pictures("imagenet-100", tmp_path).train
    mixed = part.mixed()
    assert mixed == part.mixed()
    pairs = list(zip(part.pictures, part.labels, strict=True))
    again = list(zip(mixed.pictures, mixed.labels, strict=True))
    assert again != pairs
    assert sorted(again) == pairs
    assert set(mixed.labels[:8]) == {0, 1}  # the first half is not of one class


def test_every_layout_is_described() -> None:
    assert set(WRITERS) == {*PICTURE_SETS, "PACS"}
    assert all(one.marks and one.layout for one in PICTURE_SETS.values())
