"""``know demo`` on real data, and the library behind it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from know_cli import demo
from know_cli.checkpoints.state import read_state
from know_cli.choosing.measures import FunctionMeasure, Result
from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE, UsageError
from know_cli.lab.digits import build_model, load_digits
from tests.support.command import Command, one_line

BUDGET = 24


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, know: Command
) -> Iterator[tuple[Path, CompletedProcess[str]]]:
    """A folder in which the demo was run, with little training and in one process, and its words."""

    def start(arguments: list[str], check: bool) -> CompletedProcess[str]:
        done = know(*arguments[arguments.index("know_cli") + 1 :])
        print(done.stdout)
        return done

    def take(
        measure: FunctionMeasure, start: Path, seed: int, values: Mapping[str, str], slot: int
    ) -> Result:
        return Result(demo.fine_tuned_accuracy(read_state(start), seed, **values))

    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name, epochs in (("_EPOCHS", 5), ("_RUN_EPOCHS", 5), ("_FINE_TUNING_EPOCHS", 1)):
            patch.setattr(demo, name, epochs)
        patch.setattr(subprocess, "run", start)
        patch.setattr(FunctionMeasure, "take", take)
        yield folder, know("demo", "run", "--budget", BUDGET, cwd=folder)


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path: Path, know: Command) -> None:
    done = know("demo", cwd=tmp_path, python=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout.count("In choosing:") == 2
    assert (tmp_path / "know-demo" / "from-run.png").exists()


def test_demo(recorded: tuple[Path, CompletedProcess[str]], know: Command) -> None:
    folder, done = recorded
    assert done.returncode == EXIT_DONE, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ know ")]
    assert [line.split()[2] for line in commands] == ["choose", "plot", "choose", "plot"]
    assert done.stdout.count("In choosing:") == 2
    for words in ("checkpoint-280.safetensors", "session", "To do the same", "know plot choose"):
        assert words in done.stdout
    made = {path.name for path in (folder / "run").iterdir()}
    assert made == {
        "run", "forgetting", "from-run.safetensors", "from-run.safetensors.search", "from-run.png",
        "from-forgetting.safetensors", "from-forgetting.safetensors.search", "from-forgetting.png",
    }  # fmt: skip
    for name in ("run", "forgetting"):
        search = folder / "run" / f"from-{name}.safetensors.search"
        report = json.loads((search / "report.json").read_text())
        assert report["measures"] <= BUDGET
        assert len({one["start"] for one in report["candidates"]}) == 5
    other = know("demo", "run", "--seed", 5, cwd=folder)
    assert other.returncode == EXIT_USAGE
    assert "another trajectory" in one_line(other.stderr)


def test_what_is_recorded_is_not_recorded_again(
    recorded: tuple[Path, CompletedProcess[str]],
) -> None:
    folder = recorded[0] / "run"
    told: list[str] = []
    rows = demo.record_run(folder / "run", folder / "forgetting", 0, told.append)
    sessions = demo.record_forgetting(folder / "forgetting", 0, told.append)
    assert told == []
    assert [row.path.name for row in rows][-1] == "checkpoint-280.safetensors"
    assert [row.images for row in sessions] == [450, 225, 112, 56, 28]


def test_a_run_of_another_seed_is_refused_before_there_is_a_forgetting(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_RUN_EPOCHS", 5)
    run, forgetting, told = tmp_path / "run", tmp_path / "forgetting", list[str]()

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    # One that was interrupted before its first checkpoint does not stand in another's way.
    with pytest.raises(KeyboardInterrupt):
        demo.record_run(run, forgetting, 9, interrupt)
    rows = demo.record_run(run, forgetting, 0, told.append)
    assert len(told) == 1
    done = know("demo", ".", "--seed", 5, cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "run: has the run of seed 0, not 5; give --seed 0, or" in one_line(done.stderr)
    assert demo.record_run(run, forgetting, 0, told.append) == rows
    assert len(told) == 1
    (run / "know-demo.json").write_text("notes")
    with pytest.raises(UsageError, match=r"know-demo\.json: is not what 'know demo' writes"):
        demo.record_run(run, forgetting, 0, told.append)


def test_demo_needs_a_parent_folder(tmp_path: Path, know: Command) -> None:
    done = know("demo", "no/run", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "mkdir -p no" in one_line(done.stderr)


def test_a_command_that_fails_ends_the_demo_with_its_code(
    recorded: tuple[Path, CompletedProcess[str]],
    know: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = recorded
    failed = CompletedProcess[str]([], EXIT_USAGE)
    monkeypatch.setattr(subprocess, "run", lambda *of, **wishes: failed)
    done = know("demo", "run", "--budget", BUDGET, cwd=folder)
    assert done.returncode == EXIT_USAGE
    assert "know choose failed" in done.stderr


def test_the_tasks_share_no_image() -> None:
    first, _ = demo._images(downstream=False)
    second, labels = demo._images(downstream=True)
    assert len(first) + len(second) == len(load_digits("demo")[0])
    assert labels.unique().tolist() == list(range(10))
    flat = {tuple(image.reshape(-1).tolist()) for image in first}
    assert not any(tuple(image.reshape(-1).tolist()) in flat for image in second)


def test_a_measure_depends_on_its_arguments_only() -> None:
    state = build_model(3).state_dict()
    torch.manual_seed(99)
    first = demo.fine_tuned_accuracy(state, 1)
    assert demo.fine_tuned_accuracy(state, 1, lr="1e-3") == first
    assert demo.fine_tuned_accuracy(state, 1, lr="0") != first
