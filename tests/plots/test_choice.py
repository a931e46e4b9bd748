"""The picture of a search: what is drawn of a report, in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE
from know_cli.plots.choice import choice_of, draw_choice
from tests.support.command import Command, one_line


def entry(start: str, lr: str, *values: float, failed: bool = False) -> dict[str, Any]:
    results = {str(seed): value for seed, value in enumerate(values)}
    return {"start": start, "values": {"lr": lr}, "failed": failed, "results": results}


REPORT = {
    "minimise": True,
    "base": "theta0 lr=2",
    "winner": "a lr=1",
    "is_better": False,
    "confirmed": {"pairs": 5, "mean": -0.5, "low": -1.25, "high": 0.25},
    "random_direction": {"pairs": 1, "mean": 0.5, "low": None, "high": None},
    "candidates": [
        entry("theta0", "2", 3.0, 4.0, 5.0),
        entry("a", "1", 2.0, 2.0, 4.0),
        entry("b", "2", 4.0, 4.5),
        entry("theta0", "1", 9.0),
        entry("bad", "1", failed=True),
        entry("a", "2", 5.0),
    ],
}


def test_candidates_are_in_order_each_at_the_values_that_got_furthest() -> None:
    found = choice_of(REPORT)
    assert [row.name for row in found.rows] == ["a lr=1", "b lr=2", "bad lr=1"]
    best, second, bad = found.rows
    assert best.found is not None
    assert second.found is not None
    # Paired with Θ0 at its own rate, smaller is better: −1, −2, −1 and 1, 0.5.
    assert best.found.mean == pytest.approx(-4 / 3)
    assert best.found.pairs == 3
    assert (second.found.mean, second.found.pairs) == (0.75, 2)
    assert bad.found is None
    assert [row.is_winner for row in found.rows] == [True, False, False]


def test_the_picture_says_what_was_found_and_repeats() -> None:
    picture = draw_choice(choice_of(REPORT), ".svg").decode()
    texts = ("a lr=1", "failed", "confirmed: not told from Θ0", "random-direction", "smaller is")
    for text in texts:
        assert text in picture
    assert draw_choice(choice_of(REPORT), ".svg").decode() == picture


def test_a_winner_that_fresh_seeds_find_worse_is_said_to_be_worse() -> None:
    worse = {**REPORT, "confirmed": {"pairs": 5, "mean": 0.5, "low": 0.25, "high": 0.75}}
    assert "confirmed: worse" in draw_choice(choice_of(worse), ".svg").decode()
    better = {**worse, "confirmed": {"pairs": 5, "mean": -0.5, "low": -0.75, "high": -0.25}}
    picture = draw_choice(choice_of({**better, "is_better": True}), ".svg").decode()
    assert "confirmed: better" in picture


def test_a_folder_or_a_report_is_drawn_and_nothing_else(tmp_path: Path, know: Command) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "other.json").write_text('{"minimise": true}')
    done = know("plot", "choose", tmp_path, "-o", tmp_path / "a.png")
    assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    again = know("plot", "choose", tmp_path / "report.json", "-o", tmp_path / "a.png")
    assert again.returncode == EXIT_OUTPUT
    for file, text in (("other.json", "not a report of 'know choose'"), ("none", "cannot be read")):
        done = know("plot", "choose", tmp_path / file, "-o", tmp_path / "b.png")
        assert done.returncode == EXIT_USAGE
        assert text in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        {"base": "theta0 lr=3"},
        {"base": None},
        {"candidates": []},
        {"candidates": [entry("theta0", "2", 10**400)]},
        {"confirmed": {"pairs": 3, "mean": -1e308, "low": None, "high": None}},
    ],
)
def test_a_report_without_its_base_or_numbers_is_none(
    damage: dict[str, Any], tmp_path: Path, know: Command
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, **damage}))
    done = know("plot", "choose", tmp_path, "-o", tmp_path / "a.png")
    assert done.returncode == EXIT_USAGE
    assert "is not a report of 'know choose'" in one_line(done.stderr)
    assert not (tmp_path / "a.png").exists()
