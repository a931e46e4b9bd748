"""Ranks that are threads of one process, to try many numbers of them quickly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from know_cli.ranks.alone import PeerError, Ranks

Result = TypeVar("Result")


@dataclass
class Meeting:
    """Where the ranks of one run meet."""

    size: int
    values: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)
    failed: int | None = None

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)


class ThreadRanks(Ranks):
    """One of the ranks; what it sends goes through JSON, as between processes."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting = meeting

    def _meet(self) -> None:
        try:
            self._meeting.barrier.wait()
        except threading.BrokenBarrierError:
            self.check()
            raise

    def check(self) -> None:
        if self._meeting.failed is not None:
            raise PeerError(f"rank {self._meeting.failed} has failed", 1, is_told=True)

    def gather(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = json.loads(json.dumps(value))
        self._meet()
        found = list(self._meeting.values) if self.rank == 0 else []
        self._meet()
        return found

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self._meeting.values[0] = value
        self._meet()
        found = json.loads(json.dumps(self._meeting.values[0]))
        self._meet()
        return found


def together(size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Do some work as so many ranks at once; what each returned.

    Raises:
        BaseException: what the rank that failed first has raised.
    """
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, meeting))
        except BaseException as error:
            errors[rank] = error
            if meeting.failed is None:
                meeting.failed = rank
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if meeting.failed is not None:
        raise errors[meeting.failed] or RuntimeError("no error")
    return results
