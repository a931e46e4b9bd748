"""Scikit-learn's digits (1,797 images of 8×8), and a network for them.

The images are split into two fixed halves: ``meta`` for collecting trajectories, ``demo`` for
demonstrations and tests, which the bundled KNOWN never sees.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from know_cli.errors import UsageError
from know_cli.forgetting.subsets import nested_subsets

Part = Literal["meta", "demo"]
CLASSES = 10
_SPLIT_SEED = 1797
_TEST_SHARE = 0.2
# Mean and standard deviation of all pixels, which are integers from 0 to 16.
_MEAN, _DEVIATION = 4.884, 6.017
_WIDTH = 16


@cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UsageError(
            "the digits need scikit-learn: pip install 'know-predict[demo]'"
        ) from error
    images, labels = load(return_X_y=True)
    pixels = torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8)
    return pixels, torch.from_numpy(labels.astype(np.int64))


def load_pixels(part: Part) -> tuple[Tensor, Tensor]:
    """One half of the digits, stratified, with their original values.

    Args:
        part: ``meta`` (collected trajectories) or ``demo`` (anything else).

    Returns:
        Images ``[n, 1, 8, 8]`` uint8, 0 to 16, and labels ``[n]`` int64, 0 to 9; n is 898 and
        899.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    pixels, labels = _digits()
    everything, half = nested_subsets(len(labels), 0.5, 2, _SPLIT_SEED, labels.numpy())
    chosen = half if part == "meta" else np.setdiff1d(everything, half)
    return pixels[chosen], labels[chosen]


def split_test(labels: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images, and of the fifth that is the test set."""
    everything, test = nested_subsets(len(labels), _TEST_SHARE, 2, _SPLIT_SEED, labels.numpy())
    return np.setdiff1d(everything, test), test


def load_digits(part: Part) -> tuple[Tensor, Tensor]:
    """:func:`load_pixels`, standardised: images ``[n, 1, 8, 8]`` float32, and labels."""
    pixels, labels = load_pixels(part)
    return (pixels.float() - _MEAN) / _DEVIATION, labels


class ConvolutionalNetwork(nn.Module):
    """Two 3×3 convolutions with pooling, a hidden layer and a head, for the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, padding=1)
        self.hidden = nn.Linear(8 * _WIDTH, 4 * _WIDTH)
        self.head = nn.Linear(4 * _WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[n, 1, 8, 8]`` to logits ``[n, 10]``."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(images)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        logits: Tensor = self.head(torch.relu(self.hidden(x.flatten(1))))
        return logits


def build_model(seed: int) -> ConvolutionalNetwork:
    """A freshly initialised network. The global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvolutionalNetwork()
