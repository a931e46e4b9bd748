"""The half of scikit-learn's digits that meta-training may use, as bytes."""

from __future__ import annotations

from importlib.util import find_spec

from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders, Source
from know_cli.lab.digits import CLASSES, load_pixels, split_test

# Scikit-learn's values are integers from 0 to 16; these are from 0 to 240.
_STEP = 15


def _read(folders: Folders) -> DataSet:
    pixels, labels = load_pixels("meta")
    pixels = pixels * _STEP
    train, test = (Samples(pixels[part], labels[part]) for part in split_test(labels))
    return DataSet("digits", "image", train, test, CLASSES)


DIGITS = Source(_read, lambda folders: find_spec("sklearn") is not None)
