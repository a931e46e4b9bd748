"""``know collect --regime run --checkpoints --brief --side``: what networks are taught with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from know_cli.lab.data import load
from know_cli.meta.run_recording import record_run
from know_cli.meta.run_setup import draw_run_setup
from tests.support.command import Command, one_line
from tests.support.data_sets import SETS


def test_a_brief_draw_differs_in_nothing_else() -> None:
    for seed in range(20):
        plain = draw_run_setup(seed, SETS)
        brief = draw_run_setup(seed, SETS, checkpoints=plain.checkpoints, brief=True)
        assert replace(brief, brief=False) == plain
        assert brief.future == []
        assert brief.shares == (0.2,)
        longer = draw_run_setup(seed, SETS, checkpoints=9)
        assert longer.checkpoints == len(longer.window) == 9
        assert longer.window[0] >= 0.4 * longer.end - 9
        assert (longer.design, longer.end) == (plain.design, plain.end)


def test_a_brief_record_has_one_annealing_and_no_future(tmp_path: Path) -> None:
    drawn = draw_run_setup(3, {"digits": load("digits")}, ["mlp"], checkpoints=3, brief=True)
    setup = replace(drawn, steps=20, end=15, spacing=2, samples=60, batch_size=8, warm_up=1)
    facts = record_run(setup, load("digits"), tmp_path)
    files = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert files == {
        "annealed-20", "checkpoint-000011", "checkpoint-000013", "checkpoint-000015"
    }  # fmt: skip
    assert set(facts["measured"]) == {"last", "average", "annealed-20"}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--brief",), "--brief is for --regime run"),
        (("--checkpoints", "3"), "--checkpoints is for --regime run and branches"),
        (("--regime", "release", "--brief"), "--brief is for --regime run"),
        (("--regime", "branches", "--brief"), "--brief is for --regime run"),
        (("--regime", "branches", "--checkpoints", "2"), "would be Θ0 and a single branch; give 3"),
        (("--regime", "branches", "--samples", "9000"), "--samples and --largest-batch are for"),
        (("--regime", "run", "--rows-per-tensor", "9"), "--rows-per-tensor: of runs all elements"),
        (("--regime", "branches", "--rows-per-tensor", "40000"), "--rows-per-tensor: of branches"),
        (("--side", "16"), "--side is for --regime run, branches, release and"),
        (("--samples", "9000"), "--samples and --largest-batch are for --regime release and"),
        (("--regime", "run", "--largest-batch", "64"), "--samples and --largest-batch are for"),
    ],
)
def test_forgettings_have_no_such_options(
    option: tuple[str, ...], words: str, know: Command, tmp_path: Path
) -> None:
    found = know("collect", tmp_path / "t", *option)
    assert found.returncode == 2
    assert words in one_line(found.stderr)
