"""In which precision networks compute; apart, so that help texts need no torch."""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    """Of matrix products and the like; weights, gradients and sums are float32 in either."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
