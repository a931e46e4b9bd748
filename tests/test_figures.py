"""What the tests of reliability record becomes a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.figures import ROWS, record, table

ROOT = Path(__file__).parent.parent


def test_figures_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures"
    record("fuzz", refused=1)
    assert not path.exists()
    monkeypatch.setenv("KNOW_FIGURES", str(path))
    for refused in (10_000, 20_000):  # the test goes on
        record("fuzz_slow", refused=refused)
    for _ in range(3):
        record("signals", interrupted=2)
    text = table(path.read_text().splitlines())
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert lines[ROWS[2].text].endswith("|  | 20,000 |")
    assert "| 6 |" in next(line for line in lines.values() if "SIGTERM" in line)
    assert len(text.splitlines()) == len(ROWS) + 2


def test_every_figure_is_recorded_by_a_test() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in ROWS:
        assert f'"{row.test}' in tests, row.test
