"""The row ``chosen`` of an evaluation: what it sees, what it costs, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from know_cli.choosing.candidates import choose_candidates
from know_cli.choosing.search import Settings, search
from know_cli.evaluation import chosen, hindsight, results
from know_cli.evaluation.markdown import to_markdown
from know_cli.evaluation.starts import Start, Wanted
from know_cli.evaluation.suite import Request
from know_cli.evaluation.tasks import data as task_data
from know_cli.evaluation.tasks.examples import Examples
from know_cli.evaluation.trial import Trial
from tests.evaluation.test_evaluation import tiny

BUDGET = 26
TASK = "glyphs-digits-cnn-batchnorm"


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hindsight, "_ITERATIONS", 2)
    task_data.load_images.cache_clear()
    monkeypatch.setattr(task_data, "_GLYPHS", (420, 60))
    yield
    task_data.load_images.cache_clear()


def test_what_is_chosen_is_scored_as_every_other_start_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a measure that likes small weights on what is held back, and none on the test."""
    seen: list[Examples] = []
    trial = Trial(tiny(TASK), 0, tmp_path, None)
    (cell,) = trial.problem.cells

    def held_back(trial: Trial, cell: object, starts: object, asked: object) -> float:
        return -float(sum(t.abs().sum() for t in starts.state(name_of(asked)).values()))

    def name_of(asked: object) -> str:
        start = asked.arm.start
        return "naive" if start == "theta0" else start

    monkeypatch.setattr(chosen, "_measured", held_back)
    outcome = trial.run(Wanted((), budget=BUDGET))
    found = outcome.searches[cell.name]
    assert found["start"] == found["winner"] == "shrink-lambda-0.6"
    assert found["confirmed"]["low"] > 0
    assert set(found["candidates"]) == {"naive", *(c.name for c in choose_candidates((), 5))}
    assert outcome.values[Start("chosen")] == {cell.name: found["candidates"][found["start"]]}
    assert found["candidates"]["naive"] == outcome.values[Start("naive")][cell.name]
    assert 0 < found["fine_tunings"] <= BUDGET
    assert not seen
    assert not (trial.folder / "candidates").exists()


def test_the_test_examples_are_not_seen_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(tiny(TASK), 1, tmp_path, None)
    (cell,) = trial.problem.cells
    drawn = trial.examples(cell, 0)
    fits: list[int] = []
    fine_tuned = trial.fine_tuned

    def watched(*of: object, **wishes: object) -> object:
        examples = of[2]
        if len(examples) == 6:  # of 8; 2 are held back
            fits.append(len(examples))
            rows = {row.numpy().tobytes() for row in drawn.inputs}
            assert all(row.numpy().tobytes() in rows for row in examples.inputs)
        return fine_tuned(*of, **wishes)

    monkeypatch.setattr(trial, "fine_tuned", watched)
    first = trial.run(Wanted((), budget=BUDGET))
    assert len(fits) == first.searches[cell.name]["fine_tunings"]
    again = Trial(tiny(TASK), 1, tmp_path, None).run(Wanted((), budget=BUDGET))
    assert again.computed == 0
    assert again.searches == first.searches
    assert again.values == first.values

    request = Request(tmp_path, [tiny(TASK)], 1, Wanted((), budget=BUDGET))
    content = results.to_json(request, [again], {})
    assert content["tasks"][TASK]["searches"][cell.name] == [first.searches[cell.name]]
    names = [results.start_name(start) for start in content["tasks"][TASK]["starts"]]
    assert names[-1] == "chosen"


def test_a_base_that_cannot_be_measured_stays_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "_measured", lambda *of: None)
    trial = Trial(tiny(TASK), 0, tmp_path, None)
    outcome = trial.run(Wanted((), budget=BUDGET))
    (found,) = outcome.searches.values()
    assert (found["start"], found["winner"]) == ("naive", None)
