"""The setup of a trajectory as the method's authors record them.

Each session is a single epoch at a constant rate on ever smaller parts of the data, with the
release's changes of images; the sampling rate, the learning rate and the batch size are drawn anew
for every trajectory. In the authors' sample script all sessions start from the same fresh weights;
in the paper, and in what accompanies the authors' data, each goes on from the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from know_cli.errors import UsageError
from know_cli.lab.data import AFFINE, DataSet
from know_cli.lab.data.parts import meta_part
from know_cli.lab.zoo import ARCHITECTURES, Inputs, random_design
from know_cli.meta.setup import Setup

_SESSIONS = 7
_RATES = (0.3, 0.9)
_LEARNING_RATES = (1e-5, 4e-3)
_SMALLEST_BATCH = 32
#: With fewer there would be no low rates.
_FEWEST_SAMPLES = 10_000


def draw_release_setup(
    seed: int,
    data_sets: Mapping[str, DataSet],
    architectures: Sequence[str] | None = None,
    *,
    chain: bool = False,
    most_samples: int | None = None,
    largest_batch: int | None = None,
) -> Setup:
    """Draw a trajectory's setup from its seed.

    Args:
        seed: not negative.
        data_sets: to choose from, by name; those of images are.
        architectures: to choose from; None for all that take images.
        chain: whether each session goes on from the one before; all else is drawn alike.
        most_samples: that the first session has; the others of the data set are seen by none, so
            that networks can be taught with them. None takes all.
        largest_batch: that is drawn, at least 32; None is the number of the last session's samples,
            as in the release, with which most sessions take a few steps only.

    Raises:
        UsageError: an architecture takes no images, or no data set has enough of them.
    """
    generator = np.random.default_rng([seed, 2])
    of_images = sorted(name for name, one in ARCHITECTURES.items() if one.kind == "image")
    for name in architectures or ():
        if name not in of_images:
            raise UsageError(
                f"architecture {name!r}: is none that takes images; choose from "
                f"{', '.join(of_images)}"
            )
    names = [
        name
        for name, data in sorted(data_sets.items())
        if data.kind == "image" and len(meta_part(data)) >= _FEWEST_SAMPLES
    ]
    if not names:
        raise UsageError(
            "--regime release and release-chain: none of the data sets "
            f"{', '.join(sorted(data_sets))} has {_FEWEST_SAMPLES:,} images for meta-training"
        )
    architecture = str(generator.choice(sorted(architectures or of_images)))
    data = data_sets[str(generator.choice(names))]
    samples = len(meta_part(data))
    if most_samples is not None:
        samples = min(samples, most_samples)
    # The last session has a full batch of the smallest size.
    lowest = max(_RATES[0], (_SMALLEST_BATCH / samples) ** (1 / (_SESSIONS - 1)))
    rate = math.ceil(1000 * generator.uniform(lowest, _RATES[1])) / 1000
    largest = samples * rate ** (_SESSIONS - 1)
    if largest_batch is not None:
        largest = min(largest, largest_batch)
    return Setup(
        seed=seed,
        design=random_design(architecture, Inputs(data.kind, data.shape), data.classes, generator),
        data_set=data.name,
        classes=tuple(range(data.classes)),
        samples=samples,
        rate=rate,
        sessions=_SESSIONS,
        continuations=0,
        start=None if chain else "fresh",
        epochs=1,
        later_epochs=1.0,
        continued_epochs=1.0,
        learning_rate=float(f"{generator.uniform(*_LEARNING_RATES):.3g}"),
        later_rate=1.0,
        batch_size=int(generator.uniform(_SMALLEST_BATCH, largest)),
        optimiser="adam",
        weight_decay=0.0,
        schedule="constant",
        augmentation=AFFINE,
    )
