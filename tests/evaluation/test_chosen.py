"""The row ``chosen`` of an evaluation: what it sees, what it costs, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from know_cli.choosing.candidates import choose_candidates
from know_cli.evaluation import chosen, hindsight, results
from know_cli.evaluation.chosen import HELD_BACK
from know_cli.evaluation.chosen_table import choosing_section, searched
from know_cli.evaluation.markdown import to_markdown
from know_cli.evaluation.results import comparisons
from know_cli.evaluation.starts import Start, Wanted
from know_cli.evaluation.suite import Request
from know_cli.evaluation.tasks import TASKS
from know_cli.evaluation.tasks.task import Downstream
from know_cli.evaluation.trial import Trial

BUDGET = 24
PUBLISHED = Path(results.__file__).parents[2] / "docs" / "results" / "chosen.md"
TASK = "text-language-model"
TINY = replace(
    TASKS[TASK],
    samples=34,
    recipe=replace(TASKS[TASK].recipe, epochs=1, batch_size=16),
    downstream=(Downstream(8, 1, repetitions=1),),
    tested=40,
)
NAMES = [candidate.name for candidate in choose_candidates((), 5)]


@pytest.fixture
def _little_hindsight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hindsight, "_ITERATIONS", 2)


@pytest.mark.usefixtures("_little_hindsight")
def test_only_the_examples_of_the_fine_tuning_are_seen_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(TINY, 1, tmp_path, None)
    (cell,) = trial.problem.cells
    own = {row.numpy().tobytes() for row in trial.examples(cell, 0).inputs}
    fits: list[int] = []
    fine_tuned = trial.fine_tuned

    def watched(*of: Any, **wishes: Any) -> Any:
        if len(of[2]) == 6:  # of 8, of which 2 are held back
            fits.append(6)
            assert all(row.numpy().tobytes() in own for row in of[2].inputs)
        return fine_tuned(*of, **wishes)

    monkeypatch.setattr(trial, "fine_tuned", watched)
    first = trial.run(Wanted((), budget=BUDGET), chosen.choose_starts)
    found = first.searches[cell.name]
    assert len(fits) == found["fine_tunings"] <= BUDGET
    assert set(found["candidates"]) == {"naive", *NAMES}
    assert first.values[Start("chosen")] == {cell.name: found["candidates"][found["start"]]}
    assert found["candidates"]["naive"] == first.values[Start("naive")][cell.name]
    assert not (trial.folder / "candidates").exists()

    again = Trial(TINY, 1, tmp_path, None).run(Wanted((), budget=BUDGET), chosen.choose_starts)
    assert again.computed == 0
    assert (again.searches, again.values) == (first.searches, first.values)
    request = Request(folder=tmp_path, tasks=[TINY], seeds=1, wanted=Wanted((), budget=BUDGET))
    content = results.to_json(request, [again], {})["tasks"][TASK]
    assert content["searches"][cell.name] == [found]
    assert results.start_name(content["starts"][-1]) == "chosen"


@pytest.mark.parametrize(
    ("value", "start", "winner"),
    [
        (lambda name: float(name == "last"), "last", "last"),
        (lambda name: -float(name != "naive"), "naive", None),
        (lambda name: None, "naive", None),  # Θ0 cannot be measured
    ],
)
def test_a_start_is_chosen_by_what_is_held_back(
    value: Any, start: str, winner: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(trial: object, cell: object, starts: object, asked: Any) -> float | None:
        name = asked.arm.start
        found: float | None = value("naive" if name == "theta0" else name)
        return found

    monkeypatch.setattr(chosen, "_measured", measured)
    starts: Any = SimpleNamespace(keys=dict.fromkeys(["naive", *NAMES], ""))
    facts = chosen._searched(None, None, starts, 40)  # type: ignore[arg-type]
    assert (facts["start"], facts["winner"]) == (start, winner)
    assert 0 < facts["fine_tunings"] <= 40


def task() -> dict[str, Any]:
    """Two cells and three seeds, in which ``a`` is the best candidate."""
    anchors = {"scratch": 0.1, "naive": 0.5, "longer": 0.5, "oracle": 0.9}
    values = {name: [value, value + 0.01, value + 0.02] for name, value in anchors.items()}
    picked = [0.7, 0.51, 0.62]
    starts = [
        {"method": name, "step": 0, "norm": "", "sessions": 0, "values": {"x": v, "y": v}}
        for name, v in (values | {"chosen": picked}).items()
    ]

    def one(start: str, seed: int) -> dict[str, Any]:
        naive = 0.5 + 0.01 * seed
        candidates = {"naive": naive, "a": naive + 0.2, "b": naive - 0.1}
        return {"start": start, "fine_tunings": 30 + seed, "candidates": candidates}

    cells = {"x": ["a", "naive", "b"], "y": ["a", "naive", "a"]}
    return {
        "measure": {"name": "accuracy", "unit": "%", "scale": 100},
        "seeds": [0, 1, 2],
        "starts": starts,
        "searches": {c: [one(s, k) for k, s in enumerate(found)] for c, found in cells.items()},
    }


def test_searches_are_summed_up_over_cells_and_seeds() -> None:
    found = searched(task(), comparisons(task()))
    assert (found.best, found.fine_tunings) == ("a", 31)
    assert found.kept == pytest.approx(1 / 3)
    assert found.worse == pytest.approx(1 / 6)
    assert found.hindsight.value == pytest.approx(0.2)
    assert found.chosen.value == pytest.approx(0.1)
    assert found.gap == pytest.approx(0.4)


def test_the_page_says_whether_the_targets_are_met() -> None:
    content = {"settings": {"budget": 40}, "tasks": {"t": task()}}
    page = "\n".join(choosing_section(content, {"t": comparisons(task())}))
    assert "| t | 33% | 17% | 31 | +10.00" in page
    assert "Significantly below Θ0: no task" in page
    assert "+0.250 chosen, +0.500 the best candidate in hindsight" in page
    assert page.endswith("80% of that is missed.\n")
    without: dict[str, Any] = {"settings": {}, "tasks": {"t": {"starts": []}}}
    assert list(choosing_section(without, {})) == []


def test_the_published_page_is_that_of_its_json() -> None:
    content = results.read_results(PUBLISHED.with_suffix(".json"))
    assert PUBLISHED.read_text(encoding="utf-8") == to_markdown(content)


def test_the_page_of_choosing_says_how_many_examples_were_held_back() -> None:
    root = PUBLISHED.parents[1]
    found = json.loads(PUBLISHED.with_suffix(".json").read_text(encoding="utf-8"))
    sizes = [
        max(1, round(HELD_BACK * one["size"]))
        for task in found["tasks"].values()
        for one in task["definition"]["downstream"]
    ]
    assert (min(sizes), max(sizes)) == (5, 75)
    page = " ".join((root / "choosing.md").read_text(encoding="utf-8").split())
    assert "five to 75 held-back examples" in page
