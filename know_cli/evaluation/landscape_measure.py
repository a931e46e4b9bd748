"""What a landscape of a trial can show; apart, so that help texts need no torch."""

from __future__ import annotations

from enum import Enum


class LandscapeMeasure(str, Enum):
    """Of the pre-training's test examples."""

    LOSS = "loss"
    SCORE = "score"
