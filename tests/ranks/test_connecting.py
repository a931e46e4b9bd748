"""Ranks that have all arrived and do not all connect: one is stopped, or has gone."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from know_cli.errors import UsageError
from know_cli.ranks import torchrun


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> torchrun.TorchRanks:
    """Rank 0 of 2, whose store is there and whose other rank has arrived."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = torchrun.TorchRanks(print)
    monkeypatch.setattr(ranks, "_connect", lambda: ranks._join(None))
    return ranks


def test_a_rank_that_does_not_connect_is_not_waited_for_long(
    ranks: torchrun.TorchRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would wait as long as it does for a message, five minutes, and cannot be interrupted."""
    over = threading.Event()
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **b: over.wait())
    monkeypatch.setattr(torchrun, "_CONNECT_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(UsageError, match="does not reach the other ranks .not all have connected"):
        ranks.__enter__()
    assert time.monotonic() - began < 10
    over.set()
    assert torchrun._CONNECT_SECONDS < torchrun._START_SECONDS


def test_why_ranks_cannot_connect_is_told(
    ranks: torchrun.TorchRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(UsageError, match="does not reach the other ranks .no route to host"):
        ranks.__enter__()
