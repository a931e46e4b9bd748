"""``know choose`` once more in its folder: measures and candidates are of the weights at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.choosing.measures import FunctionMeasure, Result
from know_cli.errors import EXIT_DONE, EXIT_USAGE
from know_cli.known.bundle import save_bundle
from tests.support.bundles import random_bundle
from tests.support.command import Command, one_line

AVERAGE = ["--candidate", "average"]
FOLDER = Path("out.safetensors.search")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, in this process."""
    found: list[str] = []

    def take(
        measure: FunctionMeasure, start: Path, seed: int, values: Mapping[str, str], slot: int
    ) -> Result:
        found.append(start.stem)
        return Result(float(load_file(start)["w"].abs().sum()) + seed)

    monkeypatch.setattr(FunctionMeasure, "take", take)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, of whose weights a fingerprint sees the ends only."""
    for k in range(3):
        save_file({"w": torch.full((40, 50), 1 + k / 100)}, tmp_path / f"c{k}.safetensors")
    (tmp_path / "mine.py").write_text("def larger(state, seed): return 0\n")
    return tmp_path


def arguments(*more: object) -> list[object]:
    return [
        "choose", "c0..c2", "-o", "out.safetensors", "--evaluate", "mine.py:larger",
        "--budget", 16, "--keep", "all", "--force", *more,
    ]  # fmt: skip


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / FOLDER / "report.json").read_text())
    return found


def test_on_unchanged_inputs_nothing_is_measured_or_made_again(
    run: Path, know: Command, calls: list[str]
) -> None:
    save_bundle(random_bundle(3), run / "taught")
    again = arguments(*AVERAGE, "--candidate", "known,weights=./taught")
    assert know(*again, cwd=run).returncode == EXIT_DONE
    first = report(run)
    made = {path: path.stat().st_ino for path in (run / FOLDER / "candidates").iterdir()}
    calls.clear()
    done = know(*again, cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert calls == []
    assert report(run) == first
    kept = {path: ino for path, ino in made.items() if path.stem != "random-direction"}
    assert len(kept) == 2
    assert {path: path.stat().st_ino for path in kept} == kept


def test_measures_of_a_checkpoint_that_was_saved_again_are_not_taken(
    run: Path, know: Command, calls: list[str]
) -> None:
    assert know(*arguments(*AVERAGE), cwd=run).returncode == EXIT_DONE
    weights = load_file(run / "c1.safetensors")
    weights["w"][10:30] += 30  # in the middle, where no fingerprint looks
    save_file(weights, run / "c1.safetensors")
    log = run / FOLDER / "measures.jsonl"
    before = log.read_bytes()
    calls.clear()
    done = know(*arguments(*AVERAGE), cwd=run)
    assert done.returncode == EXIT_USAGE
    last = one_line(done.stderr.splitlines()[-1] + "\n")
    assert "is of a search with other checkpoints or bundles" in last
    assert "remove it to measure anew, or give another --folder" in last
    assert calls == []
    assert log.read_bytes() == before
    # As it says: then the kept candidate is made anew, too.
    log.unlink()
    assert know(*arguments(*AVERAGE), cwd=run).returncode == EXIT_DONE
    made = load_file(run / FOLDER / "candidates" / "average.safetensors")["w"]
    expected = sum(load_file(run / f"c{k}.safetensors")["w"] for k in range(3)) / 3
    assert torch.allclose(made, torch.as_tensor(expected))
    assert calls.count("average") > 0


def test_measures_of_a_bundle_that_was_taught_again_are_not_taken(
    run: Path, know: Command, calls: list[str]
) -> None:
    save_bundle(random_bundle(3), run / "taught")
    again = arguments("--candidate", "known,weights=./taught")
    assert know(*again, cwd=run).returncode == EXIT_DONE
    save_bundle(random_bundle(3, seed=1), run / "taught")
    calls.clear()
    done = know(*again, cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "other checkpoints or bundles" in done.stderr
    assert calls == []


def test_a_touch_is_told_with_what_to_do(run: Path, know: Command) -> None:
    assert know(*arguments(*AVERAGE), cwd=run).returncode == EXIT_DONE
    os.utime(run / "c2.safetensors", ns=(0, 0))
    done = know(*arguments(*AVERAGE), cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "remove it to measure anew, or give another --folder" in done.stderr
    # What the command itself changes is told as before.
    done = know(*arguments(*AVERAGE, "--seed", 3), cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "of a search with other checkpoints, --seed; give the same again" in done.stderr
