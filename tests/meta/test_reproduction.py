"""A small meta-training from the first sample to the last score, as its committed scores say.

``tests/data/small_scores.json`` was made by the commands below, on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import Command

COMMITTED = Path(__file__).parents[1] / "data" / "small_scores.json"
COLLECT = (
    "collect trajectories --trajectories 9 --regime chain --data-set digits --architecture mlp "
    "--architecture cnn --seed 5 --rows-per-tensor 300 --processes 2"
)
TRAIN = (
    "train trajectories -o known --target continuation --checkpoints 3 --steps 2 --epochs 10 "
    "--batch-rows 256 --rows-per-tensor 300 --threads 1 --seed 1 --holdout 0.3"
)
EVALUATE = "train trajectories --evaluate known --threads 1 --json scores.json"
#: Sums of floating-point numbers differ a little from one processor to another, and training
#: enlarges such differences.
TOLERANCE = 0.02


def test_a_small_configuration_gives_its_committed_scores(tmp_path: Path, know: Command) -> None:
    for command in (COLLECT, TRAIN, EVALUATE):
        done = know(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    # The title has the digest, which is the machine's.
    (found,) = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")).values()
    (expected,) = json.loads(COMMITTED.read_text(encoding="utf-8")).values()
    assert found.keys() == expected.keys()
    for group, kinds in expected.items():
        assert found[group].keys() == kinds.keys()
        for kind, steps in kinds.items():
            for step, scores in steps.items():
                got = found[group][kind][step]
                assert got["rows"] == scores["rows"]
                for name in ("known", "average", "multiplier", "extrapolation", "least_squares"):
                    assert got[name] == pytest.approx(scores[name], abs=TOLERANCE), (
                        group, kind, step, name,
                    )  # fmt: skip
    manifest = json.loads((tmp_path / "known" / "manifest.json").read_text(encoding="utf-8"))
    for losses in manifest["losses"].values():
        assert losses["training"][-1] < losses["training"][0]
