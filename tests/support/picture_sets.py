"""Tiny data sets of pictures, each in the layout that the real one is distributed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

#: Pixels of a side of what is written; not square, so that it is cropped.
WIDTH, HEIGHT = 20, 16
CLASSES = ("cat", "dog")


def picture(path: Path, shade: int) -> None:
    """A picture of one shade, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((HEIGHT, WIDTH, 3), shade, np.uint8)
    pixels[::4] = 255 - shade
    Image.fromarray(pixels).save(path)


def class_map(path: Path, numbers: Sequence[int], palette: bool = False) -> None:
    """A map whose columns have these numbers in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array([numbers[x * len(numbers) // WIDTH] for x in range(WIDTH)], np.uint8)
    made = Image.fromarray(np.tile(row, (HEIGHT, 1)))
    if palette:
        made.putpalette([255 - n // 3 for n in range(768)])
        assert made.mode == "P"
    made.save(path)


def imagenet(folder: Path, count: int) -> None:
    for part, of in (("train", count), ("val", 3)):
        for number, name in enumerate(("n01440764", "n01443537")):
            for k in range(of):
                picture(folder / part / name / f"{name}_{k}.JPEG", 40 + 100 * number + k)


def tiny_imagenet(folder: Path, count: int) -> None:
    lines = []
    for number, name in enumerate(("n01443537", "n01629819")):
        for k in range(count):
            picture(folder / "train" / name / "images" / f"{name}_{k}.JPEG", 40 + 100 * number + k)
        picture(folder / "val" / "images" / f"val_{number}.JPEG", 40 + 100 * number)
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))


def cars(folder: Path, count: int) -> None:
    from scipy.io import savemat

    kinds = [("fname", object), ("class", object)]
    for name, of, target in (
        ("cars_train", count, folder / "devkit" / "cars_train_annos.mat"),
        ("cars_test", 4, folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for k in range(of):
            picture(folder / name / f"{k + 1:05d}.jpg", 20 + k)
            rows.append((f"{k + 1:05d}.jpg", k % 2 + 1))
        target.parent.mkdir(exist_ok=True)
        savemat(target, {"annotations": np.array(rows, dtype=kinds)})


def cub(folder: Path, count: int) -> None:
    names, labels, parts = [], [], []
    for k in range(count + 4):
        name = f"{k % 2 + 1:03d}.Bird/Bird_{k:04d}.jpg"
        picture(folder / "images" / name, 20 + k)
        names.append(f"{k + 1} {name}\n")
        labels.append(f"{k + 1} {k % 2 + 1}\n")
        parts.append(f"{k + 1} {int(k < count)}\n")
    for target, lines in (
        ("images", names), ("image_class_labels", labels), ("train_test_split", parts),
    ):  # fmt: skip
        (folder / f"{target}.txt").write_text("".join(lines))


def flowers(folder: Path, count: int) -> None:
    from scipy.io import savemat

    total = count + 4
    for k in range(1, total + 1):
        picture(folder / "jpg" / f"image_{k:05d}.jpg", 20 + k)
    savemat(folder / "imagelabels.mat", {"labels": [[k % 2 + 1 for k in range(1, total + 1)]]})
    half = count // 2
    parts = {
        "trnid": [list(range(1, half + 1))],
        "valid": [list(range(half + 1, count + 1))],
        "tstid": [list(range(count + 1, total + 1))],
    }
    savemat(folder / "setid.mat", parts)


def pacs(folder: Path, count: int) -> None:
    for number, domain in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        for k in range(count):
            picture(folder / domain / CLASSES[k % 2] / f"pic_{k:03d}.jpg", 30 * number + k)


def voc(folder: Path, count: int) -> None:
    base = folder / "VOCdevkit" / "VOC2012"
    for part, of in (("train", count), ("val", 2)):
        names = [f"2007_{part}{k:06d}" for k in range(of)]
        for k, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", 20 + k)
            class_map(base / "SegmentationClass" / f"{name}.png", [0, 255, 20], palette=True)
        listed = base / "ImageSets" / "Segmentation" / f"{part}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))


def cityscapes(folder: Path, count: int) -> None:
    for part, of in (("train", count), ("val", 2)):
        for k in range(of):
            name = f"aachen_{k:06d}_000019"
            picture(folder / "leftImg8bit" / part / "aachen" / f"{name}_leftImg8bit.png", 20 + k)
            labels = folder / "gtFine" / part / "aachen" / f"{name}_gtFine_labelIds.png"
            class_map(labels, [7, 33, 0])


def flickr(folder: Path, count: int) -> None:
    lines = ["image,caption\n"]
    for k in range(count):
        picture(folder / "Images" / f"{1000 + k}_ab.jpg", 20 + k)
        lines += [f"{1000 + k}_ab.jpg,A dog runs .\n", f'{1000 + k}_ab.jpg,"A cat, a dog ."\n']
    (folder / "captions.txt").write_text("".join(lines))


#: By the name of the data set, what writes one with so many training pictures, or of each class.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "imagenet-100": imagenet,
    "tiny-imagenet-200": tiny_imagenet,
    "stanford-cars": cars,
    "CUB_200_2011": cub,
    "flowers-102": flowers,
    "PACS": pacs,
    "VOC2012": voc,
    "cityscapes": cityscapes,
    "flickr8k": flickr,
}
