"""The half of scikit-learn's digits that KNOWN may see, as bytes."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch

from know_cli.forgetting import nested_subsets
from know_cli.forgetting.digits import CLASSES, load_digits
from know_cli.meta.data.samples import DataSet, Samples
from know_cli.meta.data.source import Folders, Source

_TEST_SHARE = 0.2
_SPLIT_SEED = 8
# The images are integers from 0 to 16, here from 0 to 240.
_LEVELS, _STEP = 16, 15


def _read(folders: Folders) -> DataSet:
    images, labels = load_digits("meta")
    # load_digits standardises by constants of its own. Both 0 and 16 occur in these images, so
    # the extremes give the integers back without a copy of those constants here.
    span = (images - images.min()) / (images.max() - images.min())
    pixels = (span * _LEVELS).round().to(torch.uint8) * _STEP
    everything, test = nested_subsets(len(labels), _TEST_SHARE, 2, _SPLIT_SEED, labels.numpy())
    train = np.setdiff1d(everything, test)
    return DataSet(
        "digits",
        "image",
        Samples(pixels[train], labels[train]),
        Samples(pixels[test], labels[test]),
        CLASSES,
    )


DIGITS = Source(_read, lambda folders: find_spec("sklearn") is not None)
