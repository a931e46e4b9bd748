"""What the engine asks of the processes (ranks) that write one output; and one rank alone."""

from __future__ import annotations

from typing import Any

from know_cli.errors import KnowError


class PeerError(KnowError):
    """Another rank has failed, which ends this run.

    Attributes:
        exit_code: that of the cause.
        is_told: whether another process reports the cause to the user.
    """

    def __init__(self, message: str, exit_code: int, *, is_told: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.is_told = is_told


class Ranks:
    """This process alone: rank 0 of 1.

    For several processes see :class:`~know_cli.ranks.torchrun.TorchRanks`. Use it as a context
    manager around all of the work. Values sent between ranks are of JSON's plain types; floats
    arrive unchanged, to the last bit.

    Attributes:
        rank: this process, 0 … size − 1. Rank 0 writes the header, renames the output and reports.
        size: how many there are.
        local_rank: this process among the ranks on this machine, from 0.

    >>> with Ranks() as ranks:
    ...     ranks.gather({"rows": 3}), ranks.broadcast("go")
    ([{'rows': 3}], 'go')
    """

    rank = 0
    size = 1
    local_rank = 0

    def check(self) -> None:
        """Raise an error if another rank has failed; costs next to nothing.

        Raises:
            PeerError: one has failed.
        """

    def gather(self, value: Any) -> list[Any]:
        """Collect every rank's value on rank 0, in rank order; the others get an empty list.

        Raises:
            PeerError: a rank has failed.
        """
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank.

        Raises:
            PeerError: a rank has failed.
        """
        return value

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the other ranks how this one ended.

        Raises:
            PeerError: another rank has failed before this one.
        """
