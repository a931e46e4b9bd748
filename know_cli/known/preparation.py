"""How windows are prepared; free of torch, so that the command line may import it."""

from __future__ import annotations

from enum import Enum


class Preparation(str, Enum):
    """How a window is put before KNOWN; a bundle's manifest names it.

    ``RAW``: the values as they are, and the answer is a change of θ0 (the paper).
    ``SPREAD``: with s = max |θk − θ0| over the window, the values are (θk − θ0) / s, the slot of
    θ0, which would be 0, holds asinh(θ0 / s), and the answer times s is the change. Where s = 0
    nothing moved, and nothing is changed.
    """

    RAW = "raw"
    SPREAD = "spread"
