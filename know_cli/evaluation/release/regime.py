"""The regimes that forgettings are evaluated in, without importing torch: help lists them."""

from __future__ import annotations

from enum import Enum


class Regime(str, Enum):
    """How long everything is trained; the values of ``know eval --regime``.

    ``CONVERGED``: to convergence, and fine-tuned on few examples.
    ``RELEASE``: as the method's authors' release trains: one epoch at a constant rate, sessions of
    one epoch each, and a long fine-tuning.
    """

    CONVERGED = "converged"
    RELEASE = "release"


#: Shares of the downstream examples that are fine-tuned on, in per cent, the cheapest first.
SHARES = (25, 50, 100)
