"""Results of the release regime from several machines."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from know_cli.errors import UsageError
from know_cli.evaluation.jobs import Trials, jobs
from know_cli.evaluation.release.joining import joined
from know_cli.evaluation.release.markdown import to_markdown
from know_cli.evaluation.release.plan import RELEASE_TASKS
from know_cli.evaluation.release.results import at_tuned_rate
from know_cli.evaluation.release.task import ReleaseTask
from tests.support.command import Command, one_line

TASK: ReleaseTask = RELEASE_TASKS["release-cifar10-cnn"]


def results(
    seeds: list[int], starts: dict[str, list[float | None]], processor: str = "x", shift: float = 0
) -> dict[str, Any]:
    """Of one task: the tuned values of starts by seed; Θ0's own test tells where it is from."""
    cell = {
        name: {
            "factors": [None if value is None else 4.0 for value in values],
            "tuned": values,
            "rates": {"1": {"values": values, "validation": values}},
        }
        for name, values in starts.items()
    }
    task = {
        "title": "noise", "definition": TASK.definition(), "seeds": seeds,
        "seconds": [1.0] * len(seeds), "cells": {"8 images": cell},
        "facts": {
            "parameters": 10, "batch_norm": False, "tested": 16, "downstream_tested": 16,
            "validated": 8, "measure": {"name": "accuracy", "unit": "points", "scale": 100.0},
        },
        "trained": {
            "ckpt0": {"steps": 5, "samples": 40, "test": [round(seed / 10 + shift, 6) for seed in seeds]}
        },
    }  # fmt: skip
    return {
        "format": 1, "regime": "release", "trajectory": "forgetting", "version": "0",
        "machine": {"processor": processor, "cores": 2, "system": "y", "python": "3", "torch": "2"},
        "settings": {"seeds": len(seeds), "from": None}, "tasks": {"noise": task},
        "not_run": {"other": "why"},
    }  # fmt: skip


def cell_of(found: dict[str, Any]) -> dict[str, Any]:
    cell: dict[str, Any] = found["tasks"]["noise"]["cells"]["8 images"]
    return cell


def test_seeds_of_another_machine_are_added_in_order() -> None:
    here = results([2, 3], {"naive": [0.2, 0.3], "mine": [0.5, None]})
    there = results([0, 1, 4], {"naive": [0.0, 0.1, 0.4], "theirs": [0.6, 0.7, 0.8]}, "z", 0.01)
    found, left_out = joined(here, there)
    assert left_out == {}
    task = found["tasks"]["noise"]
    assert task["seeds"] == [0, 1, 2, 3, 4]
    assert task["trained"]["ckpt0"]["test"] == [0.01, 0.11, 0.2, 0.3, 0.41]
    cell = cell_of(found)
    assert cell["naive"]["tuned"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert cell["mine"]["tuned"] == [None, None, 0.5, None, None]
    assert cell["theirs"]["rates"]["1"]["values"] == [0.6, 0.7, None, None, 0.8]
    assert cell["theirs"]["factors"] == [4.0, 4.0, None, None, 4.0]
    assert at_tuned_rate(cell)["theirs"].seeds == 3
    assert found["joined"] == [{"machine": there["machine"], "version": "0"}]
    assert "on x (2 cores, y, Python 3, torch 2); and z (2 cores" in to_markdown(found)


def test_starts_are_never_paired_with_another_machines_first_checkpoint() -> None:
    here = results([0, 1], {"naive": [0.0, 0.1]})
    same = results([1], {"naive": [0.9], "theirs": [0.7]})
    other = results([1], {"naive": [0.9], "theirs": [0.7]}, shift=1e-6)
    added = cell_of(joined(here, same)[0])
    assert (added["naive"]["tuned"], added["theirs"]["tuned"]) == ([0.0, 0.1], [None, 0.7])
    other["tasks"]["noise"]["cells"]["16 images"] = copy.deepcopy(cell_of(other))
    found, left_out = joined(here, other)
    assert cell_of(found)["naive"]["tuned"] == [0.0, 0.1]
    assert (list(cell_of(found)), left_out) == (["naive"], {"noise": [1]})
    assert list(found["tasks"]["noise"]["cells"]) == ["8 images"]
    assert "joined" not in found
    assert "on x (2 cores" in to_markdown(found)


def test_all_of_a_seed_is_from_one_machine() -> None:
    """A start is measured at the rate that was chosen by the same machine's validation."""
    here, there = (results([0], {"naive": [value]}) for value in (0.1, 0.2))
    cell_of(there)["naive"]["rates"]["8"] = {"values": [0.9], "validation": [0.9]}
    assert cell_of(joined(here, there)[0])["naive"]["rates"]["8"]["values"] == [None]
    assert cell_of(joined(there, here)[0])["naive"]["rates"]["8"]["values"] == [0.9]


def test_rates_of_two_machines_are_not_mixed_where_one_adds_a_start() -> None:
    """The other machine's choice of the rate is not this one's."""
    here, there = results([0], {"naive": [0.1]}), results([0], {"naive": [0.2], "theirs": [0.3]})
    cell_of(there)["naive"]["rates"]["8"] = {"values": [0.9], "validation": [0.9]}
    cell_of(there)["theirs"]["rates"]["8"] = {"values": [0.4], "validation": [0.4]}
    cell = cell_of(joined(here, there)[0])
    assert cell["naive"]["rates"] == {
        "1": {"values": [0.1], "validation": [0.1]}, "8": {"values": [None], "validation": [None]}
    }  # fmt: skip
    assert cell["theirs"]["rates"]["8"] == {"values": [0.4], "validation": [0.4]}


def test_what_joins_is_named_once_and_added_up() -> None:
    """Also what was joined before; what adds nothing is not named."""
    here = results([0], {"naive": [0.1]})
    both = joined(results([1], {"naive": [0.2]}, "b"), results([2], {"naive": [0.3]}, "c"))[0]
    found = joined(here, both)[0]
    assert [one["machine"]["processor"] for one in found["joined"]] == ["b", "c"]
    assert joined(found, results([2], {"naive": [0.3]}, "d"))[0] == found
    more = results([0], {"naive": [0.1], "theirs": [0.4]}, "d")
    task = joined(here, more)[0]["tasks"]["noise"]
    assert task["seconds"] == [2.0]  # of both machines, which trained the same Θ0


def test_conditions_and_rates_are_in_the_order_of_their_size() -> None:
    here, there = (results([seed], {"naive": [0.1]}) for seed in (0, 1))
    of_here, of_there = (one["tasks"]["noise"]["cells"] for one in (here, there))
    of_there["16 images"] = copy.deepcopy(of_there["8 images"])
    of_here["120 images"] = copy.deepcopy(of_here["8 images"])
    for factor in ("16", "0.25", "4"):
        of_here["8 images"]["naive"]["rates"][factor] = {"values": [0.1], "validation": [0.1]}
    cells = joined(here, there)[0]["tasks"]["noise"]["cells"]
    assert list(cells) == ["8 images", "16 images", "120 images"]
    assert list(cells["8 images"]["naive"]["rates"]) == ["0.25", "1", "4", "16"]


def test_a_task_with_other_sessions_is_another() -> None:
    here, there = results([0], {"naive": [0.1]}), results([1], {"naive": [0.1]})
    there["tasks"]["noise"]["trained"]["longer"] = there["tasks"]["noise"]["trained"]["ckpt0"]
    with pytest.raises(UsageError, match="the task noise has another definition there"):
        joined(here, there)


@given(st.sets(st.integers(0, 9), min_size=1), st.sets(st.integers(0, 9), min_size=1))
def test_joining_in_either_order_has_the_same_seeds(first: set[int], second: set[int]) -> None:
    one, two = (
        results(sorted(of), {"naive": [seed / 10 for seed in sorted(of)]}) for of in (first, second)
    )
    found, reverse = joined(one, two)[0], joined(two, one)[0]
    assert cell_of(found) == cell_of(reverse)
    assert found["tasks"]["noise"]["seeds"] == sorted(first | second)
    assert joined(found, two)[0]["tasks"] == found["tasks"]
    assert found["settings"]["seeds"] == len(first | second)


def test_another_task_is_added_and_another_definition_refused() -> None:
    here, there = results([0], {"naive": [0.1]}), results([0], {"naive": [0.1]})
    there["tasks"]["other"] = copy.deepcopy(there["tasks"]["noise"])
    found = joined(here, there)[0]
    assert set(found["tasks"]) == {"noise", "other"}
    assert found["not_run"] == {}  # it was run there
    there["tasks"]["noise"]["definition"]["rate"] = 0.25
    with pytest.raises(UsageError, match="the task noise has another definition there"):
        joined(here, there)


@pytest.mark.parametrize(
    ("setting", "value"), [("from", "public.safetensors"), ("precision", "bfloat16")]
)
def test_what_was_evaluated_otherwise_is_not_joined(setting: str, value: str) -> None:
    here, there = results([0], {"naive": [0.1]}), results([1], {"naive": [0.1]})
    there["settings"][setting] = value
    with pytest.raises(UsageError, match=f"--{setting} was {value} there and "):
        joined(here, there)
    with pytest.raises(UsageError, match=f" and {value} in the others; these are not compared"):
        joined(there, here)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("machine"),
        lambda found: found.pop("not_run"),
        lambda found: found.update(joined=5),
        lambda found: found["tasks"]["noise"].pop("seconds"),
        lambda found: found["tasks"]["noise"].pop("trained"),
        lambda found: found["tasks"]["noise"]["seeds"].append(7),
        lambda found: found["tasks"]["noise"].update(seeds=["0"]),
        lambda found: found["tasks"]["noise"].update(seeds=[0, 0]),
        lambda found: found["tasks"]["noise"]["cells"].update(many={}),
        lambda found: cell_of(found)["naive"]["rates"].update(
            abc={"values": [1.0], "validation": [1.0]}
        ),
    ],
)
def test_a_damaged_file_is_named(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path, know: Command
) -> None:
    content = results([0], {"naive": [0.1]})
    damage(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    done = know("eval", "--regime", "release", "-o", "out", "--join", "bad.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "bad.json: is " in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_the_command_joins_files(tmp_path: Path, know: Command) -> None:
    release = ("eval", "--regime", "release", "-o", "out")
    for name, seeds in (("a", [0]), ("b", [1, 2])):
        content = results(seeds, {"naive": [0.1] * len(seeds)}, name)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    done = know(*release, "--join", "a.json", "--join", "b.json", "--table", "t.md", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = ("--table", "b.json", "--force")  # which is an input
    assert know(*release, "--join", "b.json", *page, cwd=tmp_path).returncode == 4
    found = json.loads((tmp_path / "out" / "release.json").read_text())
    assert found["tasks"]["noise"]["seeds"] == [0, 1, 2]
    assert (tmp_path / "t.md").read_text() == to_markdown(found)
    # What is in the folder comes first.
    assert know(*release, "--join", "b.json", "-q", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "out" / "release.json").read_text()) == found
    other = results([1, 3], {"naive": [0.1, 0.1]}, "c", 0.01)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "release.json").write_text(json.dumps(other))
    told = know(*release, "--join", "c", cwd=tmp_path)
    assert "noise: seeds 1 are left out, whose Θ0 is not that of the same seeds" in told.stderr
    # A run would leave out what was joined.
    again = know(*release, "--task", TASK.name, "--seeds", "1", cwd=tmp_path)
    assert again.returncode == 2
    assert "release.json: was joined with other machines' results" in one_line(again.stderr)
    for arguments, words in (
        ((*release, "--join", "b.json", "--seeds", "3"), "--seeds: has no effect with --join"),
        (("eval", "-o", "out", "--join", "b.json"), "--join is for --regime release"),
        ((*release, "--join", "gone.json"), "gone.json: cannot be read: No such file or directory"),
        ((*release, "--join", "t.md"), "t.md: is no result of 'know eval --regime release'"),
    ):
        refused = know(*arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert words in one_line(refused.stderr)


def test_seeds_may_begin_where_others_end(tmp_path: Path) -> None:
    request = Trials(folder=tmp_path, tasks=["a", "b"], seeds=2, first_seed=5)
    assert jobs(request) == [("a", 5), ("b", 5), ("a", 6), ("b", 6)]


@pytest.mark.parametrize("text", ["0", "5-4", "-1", "1000-1000", "1001", "a", "1-2-3", ""])
def test_seeds_that_are_none(text: str, tmp_path: Path, know: Command) -> None:
    done = know("eval", "-o", "out", f"--seeds={text}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"--seeds {text}: write a number from 1 to 1000, or" in one_line(done.stderr)
