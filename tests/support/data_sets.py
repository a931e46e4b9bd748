"""Small data sets of the shapes of real ones, without anything in them."""

from __future__ import annotations

import torch

from know_cli.lab.data import DataSet, Samples


def data_set(name: str, count: int, classes: int = 10) -> DataSet:
    labels = torch.arange(count) % classes
    if name == "text":
        samples = Samples(torch.zeros(count, 64, dtype=torch.int64), labels)
        return DataSet(name, "text", samples, samples, classes, 100)
    samples = Samples(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), labels)
    return DataSet(name, "image", samples, samples, classes)


SETS = {name: data_set(name, 4000) for name in ("fashion-mnist", "text")} | {
    "digits": data_set("digits", 700)
}
