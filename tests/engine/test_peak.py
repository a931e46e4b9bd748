"""The measure of this process's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from know_cli.engine import report as memory

pytest.importorskip("resource")


@pytest.mark.parametrize("status", [memory._STATUS, Path("/nonexistent")])
def test_the_peak_has_what_was_freed_again(monkeypatch: pytest.MonkeyPatch, status: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", status)
    filled = np.ones(200 << 20, dtype=np.uint8)
    del filled
    peak = memory.peak_resident()
    assert peak is not None
    assert 200 << 20 < peak < 1 << 40


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("/nonexistent"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_resident() is None
