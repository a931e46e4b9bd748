"""The threshold above which averaging a run is warned of, learned from collected runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from know_cli.errors import UsageError
from know_cli.meta.parallel_steps import ParallelThreshold, RunCase, at, learn, read_cases


def test_the_threshold_divides_losing_runs_from_the_others() -> None:
    cases = [RunCase(0.1, False), RunCase(0.22, False), RunCase(0.31, True), RunCase(0.5, True)]
    # Anything from 0.22 to 0.31 divides them; the highest multiple of 0.05 is 0.3.
    assert learn(cases) == ParallelThreshold(0.3, warned=2, lost=2, others=2, others_lost=0)
    # Both losing runs and one of four others, against one and none above 0.4.
    noisy = [*cases, RunCase(0.05, False), RunCase(0.4, False)]
    assert learn(noisy) == ParallelThreshold(0.3, warned=3, lost=2, others=3, others_lost=0)
    assert at(0.45, noisy) == ParallelThreshold(0.45, warned=1, lost=1, others=5, others_lost=1)


@pytest.mark.parametrize("lost", [True, False])
def test_runs_of_one_sort_teach_nothing(lost: bool) -> None:
    with pytest.raises(UsageError, match=r"of 2 runs lost by averaging; a threshold needs runs of"):
        learn([RunCase(0.1, lost), RunCase(0.2, lost)])


def test_collected_runs_are_read_and_others_refused(tmp_path: Path) -> None:
    def write(name: str, **more: object) -> None:
        (tmp_path / name).mkdir()
        measured = {"last": {"test_loss": 0.5}, "average": {"test_loss": 0.6}}
        facts = {"format": 1, "measured": measured, "shape": {"parallel": 0.25}, **more}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))

    write("00000")
    write("00001", shape={})  # of two checkpoints
    write("00002", measured={"last": {"test_loss": 0.7}, "average": {"test_loss": 0.7}})
    assert read_cases(tmp_path) == [RunCase(0.25, True), RunCase(0.25, False)]
    write("00003", format=9)
    with pytest.raises(UsageError, match=r"00003/run.json: is not a run's record .* format 9"):
        read_cases(tmp_path)
