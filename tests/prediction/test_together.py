"""Several methods in one pass over the inputs: the same bytes as each alone, and one read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from know_cli.checkpoints import Checkpoint
from know_cli.engine.journal import journal_path
from know_cli.engine.progress import Silent
from know_cli.engine.settings import Settings
from know_cli.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE, OutputError, UsageError
from know_cli.methods.spelling import parse_spelled
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request
from know_cli.prediction.together import open_together
from tests.support.command import Command
from tests.support.trajectories import states, write_trajectory

# Averages also predict normalisation layers, so their stream of rows is another one than that of
# the others; tsv needs matrices whole; logfit asks for movements.
METHODS = (
    "known,steps=2",
    "average,last=3",
    "shrink,lambda=0.9,steps=3",
    "logfit",
    "tsv",
    "last",
)
# So little that there are several batches of each.
SETTINGS = Settings(threads=2, max_memory=33 << 20, allow_nonfinite=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = states(5)
    generator = torch.Generator().manual_seed(1)
    for state in found:
        state["big.weight"] = torch.randn(331, 401, generator=generator)
        state["conv2.weight"] = torch.randn(40, 8, 3, 3, generator=generator)
    found[2]["big.weight"][3, 4] = math.nan
    return write_trajectory(tmp_path_factory.mktemp("together"), found)


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> str:
    return str(bundle_path)


def requests(paths: Sequence[Path], bundle: str, folder: Path, **wishes: Any) -> list[Request]:
    folder.mkdir(exist_ok=True)
    found = []
    for text in METHODS:
        one = parse_spelled(text, "--method")
        found.append(
            Request(
                paths,
                folder / f"{one.name}.safetensors",
                bundle if one.method == "known" else None,
                replace(SETTINGS, steps=one.steps or 1),
                every_step=True,
                device="cpu",
                **{**one.request(), **wishes},
            )
        )
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def alone(
    paths: list[Path], bundle: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    for request in requests(paths, bundle, folder):
        with open_prediction(request) as prediction:
            prediction.execute()
    return contents(folder)


def test_the_same_bytes_as_alone_headers_and_all(
    paths: list[Path], bundle: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    with open_together(requests(paths, bundle, tmp_path / "out")) as together:
        assert len(list(together.predictions[1].plan.batches())) > 2
        reports = together.execute()
    assert contents(tmp_path / "out") == alone
    assert len(alone) == 9
    assert all(report.nonfinite >= 1 for report in reports)


def test_inputs_are_read_once_for_all_methods(
    paths: list[Path], bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, entry: Any, start: int, buffer: memoryview) -> None:
        read[entry.name] += len(buffer)
        read_into(self, entry, start, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    wanted = [r for r in requests(paths, bundle, tmp_path / "out") if r.method != "tsv"]
    totals = []
    for some in (wanted[:1], wanted):
        read.clear()
        with open_together([replace(one, force=True) for one in some]) as together:
            opened = read["conv2.weight"]
            together.execute()
        totals.append(read["conv2.weight"] - opened)
    assert totals[0] == totals[1]


def test_a_run_that_was_ended_goes_on(
    paths: list[Path], bundle: str, alone: dict[str, bytes], tmp_path: Path
) -> None:
    class Ends(Silent):
        left = 9

        def advance(self, parameters: int) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    wanted = requests(paths, bundle, tmp_path / "out", resume=True)
    with open_together(wanted) as together, pytest.raises(KeyboardInterrupt):
        together.execute(Ends())
    kept = list((tmp_path / "out").iterdir())
    assert kept
    assert all(path in {journal_path(one.output) for one in wanted} for path in kept)
    with open_together(wanted) as together:
        together.execute()
    assert contents(tmp_path / "out") == alone


def test_what_fails_leaves_none_of_the_outputs(
    paths: list[Path], bundle: str, tmp_path: Path
) -> None:
    wanted = requests(paths, bundle, tmp_path / "out")
    wanted = [replace(one, settings=replace(one.settings, allow_nonfinite=False)) for one in wanted]
    with (
        open_together(wanted) as together,
        pytest.raises(Exception, match="not finite in float32"),
    ):
        together.execute()
    assert list((tmp_path / "out").iterdir()) == []


def test_collisions_and_existing_outputs_are_refused(
    paths: list[Path], bundle: str, tmp_path: Path
) -> None:
    first, second, *_ = requests(paths, bundle, tmp_path / "out")
    with pytest.raises(UsageError, match="would be written by 2 of the methods"):
        open_together([first, replace(second, output=first.output)])
    second.output.touch()
    with pytest.raises(OutputError, match=second.output.name):
        open_together([first, second])
    with pytest.raises(ValueError, match="differ"):
        open_together([first, replace(second, checkpoints=paths[:3])])
    small = [
        replace(one, kernel="torch", settings=replace(one.settings, max_memory=6 << 20))
        for one in (first, replace(first, output=tmp_path / "other"))
    ]
    with pytest.raises(UsageError, match="too small for 2 methods in one pass"):
        open_together(small)


def test_the_command_names_each_output_by_its_method(
    paths: list[Path], tmp_path: Path, know: Command
) -> None:
    command = [
        "predict", *paths, "-o", tmp_path / "start.safetensors", "--steps", 2, "--every-step",
        "--method", "shrink,lambda=0.9", "--method", "task-vector,alpha=0.5,steps=1",
        "--allow-nonfinite",
    ]  # fmt: skip
    done = know(*command, "--json", tmp_path / "report.json")
    assert done.returncode == EXIT_DONE, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "start.shrink-lambda-0.9.x2.safetensors",
        "start.shrink-lambda-0.9.safetensors",
        "start.task-vector-alpha-0.5-steps-1.safetensors",
        "report.json",
    }
    again = know(*command)
    assert again.returncode == EXIT_OUTPUT
    for more in (("--option", "alpha=1"), ("--weights", "continuation"), ("--lora", "factors")):
        refused = know(*command, "--force", *more)
        assert refused.returncode == EXIT_USAGE
        assert "write it after the method's name" in refused.stderr
