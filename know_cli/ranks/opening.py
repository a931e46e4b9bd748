"""The ranks of this run: this process alone, or those that ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Callable

from know_cli.ranks.alone import Ranks
from know_cli.ranks.environment import is_one_of_several


def open_ranks(tell: Callable[[str], None]) -> Ranks:
    """Return the ranks that the environment describes, this process among them.

    Args:
        tell: called with a line for the user if the others take long to arrive.

    Raises:
        UsageError: the environment contradicts itself.
    """
    if not is_one_of_several():
        return Ranks()
    from know_cli.ranks.torchrun import TorchRanks  # imports torch

    return TorchRanks(tell)
