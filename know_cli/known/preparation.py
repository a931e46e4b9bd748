"""How windows are prepared; imports no torch, so that the command line stays light."""

from __future__ import annotations

from enum import Enum


class Preparation(str, Enum):
    """How a window is prepared for KNOWN; a bundle's manifest names it.

    ``RAW``: the values as they are; the output is the change of θ0 (the paper).
    ``SPREAD``: with s = max |θk − θ0| over the window, the values are (θk − θ0) / s. The slot of
    θ0, which would be 0, holds asinh(θ0 / s), and the output times s is the change. If s = 0,
    nothing has moved, and nothing is changed.
    """

    RAW = "raw"
    SPREAD = "spread"
