"""What of a run is measured, without importing torch: the command line's help lists it."""

from __future__ import annotations

from enum import Enum


class RunMeasure(str, Enum):
    """What of a run is measured; the values of ``know eval --measure``.

    ``PRETRAINING``: the run, its continuations and averages, by the pre-training's own measure.
    ``COSINE``: a run of the same length whose rate follows a cosine.
    ``FALLING``: a run of the same length whose rate falls to 0 in a line, and its averages.
    ``DOWNSTREAM``: fine-tuning from them, at a rate tuned for each.
    """

    PRETRAINING = "pretraining"
    COSINE = "cosine"
    FALLING = "falling"
    DOWNSTREAM = "downstream"
