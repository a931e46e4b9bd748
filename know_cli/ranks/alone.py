"""The processes that work on one output together, each a rank, as ``torchrun`` starts them."""

from __future__ import annotations

from typing import Any

from know_cli.errors import KnowError


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

    Several are a :class:`~know_cli.ranks.torchrun.TorchRanks`. Use as a context manager around
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
