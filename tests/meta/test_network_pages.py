"""The published pages on what was taught are those that their JSON gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from know_cli.cli.scores import scores_markdown
from know_cli.cli.train_network import best_average_of, network_markdown
from know_cli.kinds import Kind
from know_cli.meta.scores import Scores

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = sorted(RESULTS.glob("network*.json"))


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.stem))
def test_a_page_is_what_its_json_gives(file: Path) -> None:
    facts = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == network_markdown(facts)
    # Nothing was measured on what was learned from.
    held_out = {name for names in facts["held_out"].values() for name in names}
    assert not held_out & set(facts["taught_on"])
    assert len(held_out) == sum(found["runs"] for found in facts["gains"].values())


def test_no_hyper_model_is_shipped_that_was_taught_so_while_none_is_ahead_of_every_average() -> (
    None
):
    """The rule by which none is: on all that was held out, an interval above zero over each."""
    assert PAGES
    lows: dict[str, list[float]] = {}
    for file in PAGES:
        facts = json.loads(file.read_text())
        for found in facts["gains"].values():
            lows.setdefault(facts["digest"], []).extend(
                found["ahead"][name][0] - found["ahead"][name][1]
                for name in found["ahead"]
                if name.startswith("average") or name == "last"
            )
            assert best_average_of(found) in found["ahead"]
    assert all(min(of) <= 0 for of in lows.values())
    assert not list((RESULTS.parents[1] / "weights").glob("*/window-*"))


@pytest.mark.parametrize("name", ["faithful-212", "faithful", "faithful-factor"])
def test_the_page_of_a_faithful_hyper_model_is_what_its_json_gives(name: str) -> None:
    file = RESULTS / f"{name}.json"
    tables = {
        title: {
            group: {
                Kind(kind): {int(step): Scores(**scores) for step, scores in steps.items()}
                for kind, steps in kinds.items()
            }
            for group, kinds in groups.items()
        }
        for title, groups in json.loads(file.read_text()).items()
    }
    assert scores_markdown(tables) == file.with_suffix(".md").read_text()
    (table,) = tables.values()
    for of_kind in table["trajectories"].values():
        for scores in of_kind.values():
            assert scores.known < min(1, scores.least_squares, scores.average)
            # Nearer than any factor of Θ0, which is close to 1: half of it is far from the target.
            assert scores.known < scores.multiplier
            assert 0.94 < scores.multiplier_value <= 1.001
            # The one with a factor is compared with the one without, which is the first page's.
            (other,) = scores.others.keys() & {"authors", "faithful"}
            assert scores.known < scores.others[other]
