"""The processes that work on one output together, each a rank, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from know_cli.errors import KnowError, UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerError(KnowError):
    """Another rank has failed, and so has the run.

    Attributes:
        exit_code: that of the cause.
        is_told: whether another process tells the user the cause.
    """

    def __init__(self, message: str, exit_code: int, *, is_told: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.is_told = is_told


class Ranks:
    """This process alone: rank 0 of 1.

    Several are a :class:`~know_cli.engine.torchrun.TorchRanks`. Use as a context manager around
    all of the work. Values that go between ranks are of the plain types of JSON; floats arrive
    as they were sent, to the last bit.

    Attributes:
        rank: this process, 0 … size − 1; rank 0 writes the header, renames and reports.
        size: how many there are.
        local_rank: number among those on this machine.
    """

    rank = 0
    size = 1
    local_rank = 0

    def check(self) -> None:
        """Go on if all ranks do; costs next to nothing.

        Raises:
            PeerError: one has failed.
        """

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in the order of ranks, on rank 0; nothing on the others.

        Raises:
            PeerError: a rank has failed.
        """
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank.

        Raises:
            PeerError: a rank has failed.
        """
        return value

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Let the other ranks know how this one has ended.

        Raises:
            PeerError: another rank has failed before this one.
        """


def is_one_of_several() -> bool:
    """Whether ``torchrun``, or whatever sets the same variables, has started several ranks.

    Raises:
        UsageError: the variables are no numbers, or contradict each other.
    """
    if any(name not in os.environ for name in _VARIABLES):
        return False
    size, rank, _ = map(environment_number, ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank}, WORLD_SIZE={size}: no such rank; start with torchrun")
    return size > 1


def processes_here() -> int:
    """How many ranks share this machine; 1 where there is no other.

    Raises:
        UsageError: the environment contradicts itself.
    """
    if not is_one_of_several() or "LOCAL_WORLD_SIZE" not in os.environ:
        return 1
    return max(1, environment_number("LOCAL_WORLD_SIZE"))


def environment_number(name: str) -> int:
    """A variable of the environment that is a number.

    Raises:
        UsageError: it is not.
    """
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{name}={text!r} in the environment is no number; start with torchrun")
    return int(text)


def open_ranks(tell: Callable[[str], None]) -> Ranks:
    """The ranks that the environment tells of, with this process among them.

    Args:
        tell: is given a line for the user if the others are long in coming.

    Raises:
        UsageError: the environment contradicts itself, or not all ranks have come.
    """
    if not is_one_of_several():
        return Ranks()
    from know_cli.engine.torchrun import TorchRanks  # imports torch

    return TorchRanks(tell)
