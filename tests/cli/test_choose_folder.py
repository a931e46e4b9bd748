"""What ``know choose`` leaves in its folder: candidates, measures, a report; and who may use it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from know_cli.choosing import log
from know_cli.choosing.log import Log
from know_cli.choosing.measures import FunctionMeasure, Result
from know_cli.choosing.worker import answer, check_function
from know_cli.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    EXIT_USAGE,
    OutputError,
    UsageError,
)
from tests.support.command import Command, one_line

CANDIDATES = ["--candidate", "shrink,lambda=0.8", "--candidate", "shrink,lambda=0.8,steps=2"]
FUNCTIONS = """
from pathlib import Path
import torch
calls = Path("calls")
def smaller(state, seed):
    with calls.open("a") as file: file.write(f"{seed}\\n")
    return -float(state["w"].abs().sum()) + seed
def larger(state, seed): return float(state["w"].abs().sum())
def only_small(state, seed):
    if state["w"].abs().max() < 0.7: raise MemoryError("too small")
    return -float(state["w"].abs().sum())
"""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are called here: to start a process with torch takes longer than all measures."""

    def take(
        measure: FunctionMeasure, start: Path, seed: int, values: Mapping[str, str], slot: int
    ) -> Result:
        found = answer(check_function(measure._function, ()), start, seed, values)
        if "error" in found:
            return Result(None, found["error"], found["output"])
        return Result(float(found["value"]))

    monkeypatch.setattr(FunctionMeasure, "take", take)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for k in range(3):
        save_file({"w": torch.full((6, 5), 1 - k / 100)}, tmp_path / f"c{k}.safetensors")
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def arguments(function: str, *more: object) -> list[object]:
    return [
        "choose", "c0..c2", "-o", "out.safetensors", "--evaluate", f"mine.py:{function}",
        "--budget", 16, *CANDIDATES, *more,
    ]  # fmt: skip


def kept(run: Path) -> set[str]:
    return {path.name for path in (run / "out.safetensors.search" / "candidates").iterdir()}


@pytest.mark.parametrize(
    ("keep", "function", "names"),
    [
        ("none", "smaller", set()),
        ("best", "smaller", {"shrink-lambda-0.8-steps-2.safetensors"}),
        ("best", "larger", set()),
        (
            "all",
            "smaller",
            {
                "shrink-lambda-0.8.safetensors",
                "shrink-lambda-0.8-steps-2.safetensors",
                "random-direction.safetensors",
            },
        ),
    ],
)
def test_what_stays_is_what_was_asked_for(
    keep: str, function: str, names: set[str], run: Path, know: Command
) -> None:
    done = know(*arguments(function, "--keep", keep), cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert kept(run) == names
    report = json.loads((run / "out.safetensors.search" / "report.json").read_text())
    assert report["is_better"] is (function == "smaller")
    assert (run / "c0.safetensors").exists()


@pytest.mark.parametrize("keep", ["none", "best", "all"])
def test_what_is_not_of_the_search_stays(keep: str, run: Path, know: Command) -> None:
    candidates = run / "mine" / "candidates"
    (candidates / "work").mkdir(parents=True)
    (candidates / "work" / "notes.txt").write_text("precious")
    (candidates / "other.safetensors").write_bytes(b"precious")
    (run / "mine" / "model.safetensors").write_bytes(b"precious")
    for _ in range(2):
        done = know(*arguments("smaller", "--folder", "mine", "--keep", keep, "--force"), cwd=run)
        assert done.returncode == EXIT_DONE, done.stderr
        assert (candidates / "work" / "notes.txt").read_text() == "precious"
        assert (candidates / "other.safetensors").read_bytes() == b"precious"
        assert (run / "mine" / "model.safetensors").read_bytes() == b"precious"
    count = {"none": 0, "best": 1, "all": 3}[keep]
    assert len(list(candidates.iterdir())) == 2 + count


@pytest.mark.parametrize(
    "name",
    [
        "candidates/shrink-lambda-0.8.safetensors",
        "candidates/shrink-lambda-0.8.safetensors.sha256",
        "candidates/random-direction.safetensors",
        "report.json",
        "made.json",
    ],
)
def test_what_is_in_the_way_and_of_no_search_is_refused(
    name: str, run: Path, know: Command
) -> None:
    path = run / "mine" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"precious": true}')
    done = know(*arguments("smaller", "--folder", "mine"), cwd=run)
    assert done.returncode == EXIT_OUTPUT
    last = one_line(done.stderr.splitlines()[-1] + "\n")
    assert f"mine/{name}: is " in last
    assert "move it away, or give another --folder" in last
    assert path.read_text() == '{"precious": true}'
    assert not (run / "calls").exists()


def test_a_candidate_that_was_replaced_is_neither_taken_nor_removed(
    run: Path, know: Command
) -> None:
    assert know(*arguments("smaller", "--keep", "all"), cwd=run).returncode == EXIT_DONE
    path = run / "out.safetensors.search" / "candidates" / "shrink-lambda-0.8.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    mine = path.read_bytes()
    done = know(*arguments("smaller", "--force"), cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "shrink-lambda-0.8.safetensors: has changed since a search made it" in done.stderr
    assert path.read_bytes() == mine


def test_of_folders_only_the_files_that_were_made_are_removed(run: Path, know: Command) -> None:
    for k in range(3):
        (run / f"f{k}").mkdir()
        (run / f"c{k}.safetensors").rename(run / f"f{k}" / "model.safetensors")
        (run / f"f{k}" / "config.json").write_text("{}")
    (run / "mine.py").write_text(
        "def smaller(state, seed): return -float(state['w'].abs().sum()) + seed\n"
    )
    again = [
        "choose", "f0..f2", "-o", "out", "--evaluate", "mine.py:smaller", "--budget", 16,
        *CANDIDATES, "--force",
    ]  # fmt: skip
    done = know(*again, "--keep", "all", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    candidates = run / "out.search" / "candidates"
    assert (candidates / "shrink-lambda-0.8" / "config.json").exists()
    (candidates / "shrink-lambda-0.8" / "notes.txt").write_text("precious")
    assert know(*again, cwd=run).returncode == EXIT_DONE
    assert [str(one.relative_to(candidates)) for one in sorted(candidates.rglob("*"))] == [
        "shrink-lambda-0.8",
        "shrink-lambda-0.8/notes.txt",
    ]
    done = know(*again, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "shrink-lambda-0.8/notes.txt: is in the way" in done.stderr


def test_an_interrupted_search_goes_on_with_what_it_has(
    run: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    add = Log.add

    def interrupted(log: Log, *of: object) -> None:
        nonlocal taken
        add(log, *of)  # type: ignore[arg-type]
        taken += 1
        if taken == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "add", interrupted)
    done = know(*arguments("smaller"), cwd=run)
    assert done.returncode == EXIT_INTERRUPTED
    assert not (run / "out.safetensors").exists()
    first = len((run / "calls").read_text().splitlines())
    monkeypatch.setattr(Log, "add", add)
    done = know(*arguments("smaller"), cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "goes on with 5 measures that were taken before" in done.stderr
    report = json.loads((run / "out.safetensors.search" / "report.json").read_text())
    every = len((run / "calls").read_text().splitlines())
    # At most the one that was under way is taken twice.
    assert report["measures"] <= every <= report["measures"] + 1
    assert 5 <= first <= 6


def test_a_candidate_whose_measure_fails_is_told_and_does_not_end_the_search(
    run: Path, know: Command
) -> None:
    done = know(*arguments("only_small"), cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "shrink-lambda-0.8-steps-2 with seed 0: the measure raised MemoryError" in done.stderr
    assert "shrink-lambda-0.8 is better than Θ0" in done.stdout


def test_a_read_only_folder_is_refused_before_anything_is_made(
    run: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *of: Any, **wishes: Any) -> Any:
        assert path.name == "measures.jsonl"
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(log, "open_own", refuse)
    done = know(*arguments("smaller"), cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "measures.jsonl: cannot be written: Read-only file system" in done.stderr
    assert kept(run) == set()
    assert not (run / "calls").exists()


def test_a_folder_that_is_a_file_is_refused(run: Path, know: Command) -> None:
    (run / "file").touch()
    done = know(*arguments("smaller", "--folder", "file"), cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert done.stderr.splitlines()[-1].startswith("know: error: file: cannot be made")
    assert not (run / "out.safetensors").exists()


def test_two_searches_at_once_in_one_folder(run: Path, know: Command) -> None:
    folder = run / "out.safetensors.search"
    folder.mkdir()
    other = Log(folder / "measures.jsonl", {"of": "another"})
    try:
        done = know(*arguments("smaller"), cwd=run)
        assert done.returncode == EXIT_OUTPUT
        assert "another search is at work in this folder" in done.stderr
    finally:
        other.close()
    done = know(*arguments("smaller"), cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "is of a search with other checkpoints" in done.stderr


def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "measures.jsonl"
    for content in (b"my own notes", b"my own notes\nand more\n", b"\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="another --folder"):
            Log(path, {"a": 1})
        assert path.read_bytes() == content
    with pytest.raises(OutputError, match="cannot be written"):
        Log(tmp_path / "none" / "log", {})


def test_a_log_that_was_just_begun_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    Log(path, {"a": 1}).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:9])
    Log(path, {"a": 1}).close()
    assert path.read_bytes() == whole


def test_a_folder_in_an_input_is_refused_and_nothing_is_made_there(
    run: Path, know: Command
) -> None:
    for k in range(3):
        (run / f"d{k}").mkdir()
        (run / f"c{k}.safetensors").rename(run / f"d{k}" / "model.safetensors")
    done = know(
        "choose", "d0..d2", "-o", "out", "--evaluate", "mine.py:smaller", "--budget", 16,
        *CANDIDATES, "--folder", "d1/search", cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_OUTPUT
    last = done.stderr.splitlines()[-1]
    assert last == "know: error: --folder d1/search: lies in the input d1; name another folder"
    assert [path.name for path in (run / "d1").iterdir()] == ["model.safetensors"]
