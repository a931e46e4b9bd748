"""Error rates over a sample of the inventories of real architectures; the script takes them all."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.check_inventories import Score, check, read_inventories

SAMPLE = Path(__file__).parent / "fixtures" / "inventories-sample.zip"


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    return {name: check(inventory) for name, inventory in read_inventories(SAMPLE)}


@pytest.fixture(scope="module")
def total(scores: dict[str, Score]) -> Score:
    result = Score()
    for score in scores.values():
        result.add(score)
    return result


def test_hardly_any_tensor_is_of_a_wrong_kind(total: Score) -> None:
    assert total.tensors > 6000
    assert total.share_wrong_strictly <= 0.003


def test_every_norm_is_found(total: Score) -> None:
    assert total.norms_missed == []


def test_no_source_is_wrong_and_few_are_missed(total: Score) -> None:
    assert total.fed > 500
    assert total.wrong_sources == []
    assert total.share_missed <= 0.15


@pytest.mark.parametrize(
    "name", ["timm-efficientnet_b0", "timm-mobilenetv3_small_100", "pytorchcv-mnasnet_a1",
             "timm-levit_conv_128s", "timm-repvgg_a0", "monai-FlexibleUNet"],
)  # fmt: skip
def test_families_whose_names_tell_are_found(scores: dict[str, Score], name: str) -> None:
    assert scores[name].share_missed <= 0.15


@pytest.mark.parametrize("name", ["pytorchcv-condensenet74_c8_g8", "torch-preact_square_blocks"])
def test_networks_that_normalise_first_get_no_wrong_source(
    scores: dict[str, Score], name: str
) -> None:
    assert scores[name].wrong_sources == []


def write_zip(path: Path, inventory: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.json", json.dumps(inventory))
    return path


def test_faults_are_counted_each_as_what_it_is(tmp_path: Path) -> None:
    statistics = [
        [f"bn1.{leaf}", [8], "F32", "copy", "B"] for leaf in ("running_mean", "running_var")
    ]
    inventory = {
        "arch": "a", "library": "b",
        "bn": {"bn1": [None], "gone": ["conv1.weight"], "idle": ["unused"]},
        "tensors": [
            ["conv1.weight", [8, 3, 3, 3], "F32", "fc", "Linear"],
            ["conv2.weight", [8, 8, 3, 3], "F32", "fc|conv", "Linear"],
            ["act.weight", [8], "F32", "norm", "Norm"],
            ["norm.weight", [8], "F32", "bias", "Scale"],
            *statistics,
        ],
    }  # fmt: skip
    ((_, read),) = read_inventories(write_zip(tmp_path / "a.zip", inventory))
    score = check(read)
    assert score.tensors == 6
    assert [fault[0] for fault in score.wrong] == ["conv1.weight"]
    assert [fault[0] for fault in score.norms_missed] == ["act.weight"]
    assert [fault[0] for fault in score.norms_invented] == ["norm.weight"]
    assert score.wrong_sources == [("bn1", [None], "conv1.weight")]
    assert score.missed_sources == ["gone"]
    assert (score.share_wrong, score.share_wrong_strictly) == (1 / 6, 3 / 6)
    assert score.share_missed == 1


def test_the_script_prints_rates_and_what_is_wrong(tmp_path: Path) -> None:
    inventory = {"arch": "a", "library": "b", "bn": None,
                 "tensors": [["fc.weight", [8, 8], "F32", "conv", "Conv"]]}  # fmt: skip
    path = write_zip(tmp_path / "a.zip", inventory)
    command = [sys.executable, "-m", "tests.support.check_inventories", str(path), "--all"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "('fc.weight', [8, 8], 'conv', 'fc')" in done.stdout
    assert "1 inventories, 1 tensors: 100.000% of a wrong kind" in done.stdout
    assert "0 BatchNorms with a source: 0 wrong, 0.0% missed" in done.stdout
