"""The ranks of this run: this process alone, or those that ``torchrun`` has started."""

from __future__ import annotations

from collections.abc import Callable

from know_cli.ranks.alone import Ranks
from know_cli.ranks.environment import is_one_of_several


def open_ranks(tell: Callable[[str], None]) -> Ranks:
    """The ranks that the environment tells of, with this process among them.

    Args:
        tell: is given a line for the user if the others are long in coming.

    Raises:
        UsageError: the environment contradicts itself, or not all ranks have come.
    """
    if not is_one_of_several():
        return Ranks()
    from know_cli.ranks.torchrun import TorchRanks  # imports torch

    return TorchRanks(tell)
