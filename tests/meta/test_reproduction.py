"""Small meta-trainings from the first sample to the last score, as their committed scores say.

``small_scores.json`` and ``law_scores.json`` in ``tests/data`` were made by the commands below, on
other machines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Command
from tests.support.recorded import geometric, record

DATA = Path(__file__).parents[1] / "data"
COLLECT = (
    "collect trajectories --trajectories 9 --regime chain --data-set digits --architecture mlp "
    "--architecture cnn --seed 5 --rows-per-tensor 300 --processes 2"
)
TRAIN = (
    "train trajectories -o known --target continuation --checkpoints 3 --steps 2 --epochs 10 "
    "--batch-rows 256 --rows-per-tensor 300 --threads 1 --seed 1 --holdout 0.3"
)
EVALUATE = "train trajectories --evaluate ./known --threads 1 --json scores.json"
#: Sums of floating-point numbers differ a little from one processor to another, and training
#: enlarges such differences.
TOLERANCE = 0.02


@pytest.mark.slow
def test_trajectories_of_small_networks_give_their_committed_scores(
    tmp_path: Path, know: Command
) -> None:
    for command in (COLLECT, TRAIN, EVALUATE):
        done = know(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    check(tmp_path, "small_scores.json")


def test_trajectories_of_a_law_give_their_committed_scores(tmp_path: Path, know: Command) -> None:
    for seed in range(9):
        record(tmp_path / "trajectories" / str(seed), geometric(seed), seed=seed, before=3)
    for command in (TRAIN, EVALUATE):
        done = know(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    check(tmp_path, "law_scores.json")


def check(folder: Path, committed: str) -> None:
    """The scores are the committed ones, and the training brought something."""
    found, expected = scores(folder / "scores.json"), scores(DATA / committed)
    assert found.keys() == expected.keys()
    for group, kinds in expected.items():
        assert found[group].keys() == kinds.keys()
        for kind, steps in kinds.items():
            assert found[group][kind].keys() == steps.keys()
            for step, one in steps.items():
                got = found[group][kind][step]
                assert got["rows"] == one["rows"]
                for name in ("known", "average", "multiplier", "extrapolation", "least_squares"):
                    assert got[name] == pytest.approx(one[name], abs=TOLERANCE), (
                        group, kind, step, name,
                    )  # fmt: skip
    manifest = json.loads((folder / "known" / "manifest.json").read_text(encoding="utf-8"))
    for losses in manifest["losses"].values():
        assert losses["training"][-1] < losses["training"][0]


def scores(path: Path) -> dict[str, Any]:
    """By group, kind and step; the title has the bundle's digest, which is the machine's."""
    (found,) = json.loads(path.read_text(encoding="utf-8")).values()
    assert isinstance(found, dict)
    return found
