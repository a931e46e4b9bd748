from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.errors import UsageError
from know_cli.evaluation.runs import averages, fine_tuning, plan, results
from know_cli.evaluation.runs import suite as running
from know_cli.evaluation.runs import trial as protocol
from know_cli.evaluation.runs.averages import AVERAGES, Average, coefficients, re_estimate
from know_cli.evaluation.runs.markdown import to_markdown
from know_cli.evaluation.runs.measures import RunMeasure
from know_cli.evaluation.runs.trial import DOWNSTREAM, RunTrial
from know_cli.evaluation.starts import Wanted
from know_cli.evaluation.statistics import Estimate
from know_cli.evaluation.suite import Request
from know_cli.evaluation.tasks import TASKS, Downstream, Examples, Task
from know_cli.evaluation.tasks import cifar as cifar_tasks
from know_cli.evaluation.tasks import data as task_data
from know_cli.lab.averaging import combine, shape_of
from know_cli.lab.data import DataSet, Samples
from know_cli.lab.fitting import one_thread
from know_cli.lab.stepping import Training
from know_cli.settle.bundle import SettleBundle, load_bundle, save_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line
from tests.support.interrupted import temporaries

TEXT = "text-language-model"
SHAPES = ("uniform", "linear", "sqrt", "cosine", "ema")
ARMS = {
    "last", "annealed-10", "annealed-20", "longer-10", "longer-20", "average-2", "average-3",
    "average-5", "average-5-linear", "average-5-sqrt", "average-5-cosine", "average-5-ema",
}  # fmt: skip


def pictures(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Samples(pixels, torch.arange(count) % 10)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


NOISE = DataSet("fashion-mnist", "image", pictures(1200, 1), pictures(200, 2), 10)


@pytest.fixture
def _little_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise in the shape of Fashion-MNIST, and no task's own length of run."""
    task_data.load_images.cache_clear()
    monkeypatch.setattr(task_data, "load", lambda name, folder: NOISE)
    monkeypatch.setattr(plan, "_LENGTHS", {})
    yield
    task_data.load_images.cache_clear()


def tiny(name: str) -> Task:
    """A task as it is, but with next to no data and training."""
    return replace(
        TASKS[name],
        samples=64,
        recipe=replace(TASKS[name].recipe, epochs=3, batch_size=16),
        downstream=(Downstream(8, 1, 1e-3, repetitions=1),),
        tested=24,
    )


# --- averages ----------------------------------------------------------------------------------


def test_coefficients_are_those_that_were_computed_by_hand() -> None:
    assert coefficients(Average(4)) == [0.25] * 4
    assert coefficients(Average(3, "linear")) == [0.25, 0.5, 0.25]
    # Updates before checkpoint 1 count 1 − √¼ = ½, those before checkpoint 2 count 1 − √¾.
    assert coefficients(Average(3, "sqrt")) == pytest.approx([0.5, 0.5 - 0.1339746, 0.1339746])
    # (1 + cos 45°)/2 and (1 + cos 135°)/2.
    assert coefficients(Average(3, "cosine")) == pytest.approx([0.1464466, 0.7071068, 0.1464466])
    # Half as much for each checkpoint before the last: of 1/4, 1/2, 1.
    assert coefficients(Average(3, "ema")) == pytest.approx([1 / 7, 2 / 7, 4 / 7])


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(2, 12))
@settings(max_examples=20, deadline=None)
def test_coefficients_are_shares_of_one(shape: str, count: int) -> None:
    found = coefficients(Average(count, shape))
    assert len(found) == count
    assert min(found) > 0
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_an_average_is_the_run_with_its_updates_shrunk_by_the_decay(shape: str) -> None:
    generator = torch.Generator().manual_seed(5)
    checkpoints = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    decay: Callable[[float], float] = {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - x**0.5,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    }[shape]
    shrunk = checkpoints[0].clone()
    for j in range(1, 5):
        shrunk += decay((j - 0.5) / 4) * (checkpoints[j] - checkpoints[j - 1])
    states = [{"w": row} for row in checkpoints]
    found = combine(states, coefficients(Average(5, shape)))["w"]
    torch.testing.assert_close(found, shrunk, rtol=0, atol=1e-12)


def test_running_statistics_of_an_average_are_those_of_all_that_was_seen() -> None:
    generator = torch.Generator().manual_seed(6)
    seen = [torch.randn(50, 3, generator=generator) * (1 + k) + k for k in range(3)]
    states = [
        {
            "n.running_mean": part.mean(0),
            "n.running_var": part.var(0, unbiased=False),
            "n.num_batches_tracked": torch.tensor(10 * k),
        }
        for k, part in enumerate(seen, 1)
    ]
    found = combine(states, [1 / 3] * 3)
    every = torch.cat(seen)
    torch.testing.assert_close(found["n.running_mean"], every.mean(0))
    torch.testing.assert_close(found["n.running_var"], every.var(0, unbiased=False))
    assert found["n.num_batches_tracked"] == 30  # the last one's, and still an integer
    assert found["n.num_batches_tracked"].dtype == torch.int64
    plain = combine(states, [1 / 3] * 3, spread=False)
    torch.testing.assert_close(
        plain["n.running_var"], torch.stack([s["n.running_var"] for s in states]).mean(0)
    )


def test_an_average_keeps_dtypes_and_rounds_once() -> None:
    states = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0)]
    # Summed in bfloat16, 256 + 1 + 1 stays 256.
    found = combine(states, [1 / 3] * 3)["w"]
    assert found.dtype == torch.bfloat16
    assert found.item() == torch.tensor(86.0, dtype=torch.bfloat16).item()


def test_statistics_are_measured_again_on_the_examples() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 3 + 2
    re_estimate(model, Examples(inputs, torch.zeros(64, dtype=torch.int64)))
    torch.testing.assert_close(model[0].running_mean, inputs.mean(0))
    torch.testing.assert_close(model[0].running_var, inputs.var(0))
    assert not model.training


def test_the_shape_of_a_run_is_the_one_computed_by_hand() -> None:
    def states(points: list[tuple[float, float]]) -> list[dict[str, Tensor]]:
        return [
            {
                "w": torch.tensor(point).double(),
                "n.running_var": torch.tensor(9.0),
                "n": torch.tensor(k),
            }
            for k, point in enumerate(points)
        ]

    assert shape_of(states([(1, 0), (2, 0), (4, 0)])) == {"parallel": 1, "kept": 1}
    # Back and forth; the mean (3, 2) has norm √13, the norms are 5, √13 and 5.
    back = shape_of(states([(3, 4), (3, -2), (3, 4)]))
    assert back == {"parallel": -1, "kept": round(3 * 13**0.5 / (10 + 13**0.5), 5)}
    # A right angle, then half of one: cosines 0 and √½.
    turned = shape_of(states([(0, 0), (1, 0), (1, 1), (2, 2)]))
    assert turned["parallel"] == round(0.5**0.5 / 2, 5)


def test_rates_rise_stay_and_fall() -> None:
    warm = protocol.warmed_up(100)
    assert [warm(0), warm(4), warm(5), warm(150)] == [0.2, 1, 1, 1]
    falling = protocol.falling(100, 10)
    assert [falling(100 + k) for k in range(10)] == pytest.approx(
        [0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05]
    )


# --- trials ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_little_data")
def test_a_trial_measures_every_arm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = RunTrial(tiny("fashion-classes-cnn-batchnorm"), 2, tmp_path, None)
    found = trial.pretraining()
    assert set(found["values"]) == ARMS
    assert set(found["values"]["last"]) == {"stored", "re-estimated"}
    assert set(found["values"]["average-5"]) == {"closed", "plain", "re-estimated"}
    assert set(found["values"]["average-2"]) == {"closed"}
    assert found["facts"]["steps"] == 3 * 128 // 16
    assert found["facts"]["samples"] == 128
    assert set(found["sweep"]) == {"2", "3", "5", "9"}
    assert set(found["sweep"]["9"]) == {"0.01", "0.02", "0.04", "0.08"}
    starts = {name: trial.downstream(name) for name in DOWNSTREAM}
    for value in starts.values():
        best = max(value["validation"].values())
        assert value["validation"][f"{value['factor']:g}"] == best
        assert value["cell"] == "8 images"
    cosine, falling = trial.cosine(), trial.falling()
    assert {name: set(by) for name, by in falling["sweep"].items()} == {
        name: set(by) for name, by in found["sweep"].items()
    }
    assert falling["spaced"].keys() == {"0.01", "0.02", "0.04", "0.08"}

    def fail(*arguments: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Training, "advance", fail)
    monkeypatch.setattr(fine_tuning, "train", fail)
    again = RunTrial(tiny("fashion-classes-cnn-batchnorm"), 2, tmp_path, None)
    assert again.pretraining() == found
    assert again.cosine() == cosine
    assert again.falling() == falling
    assert again.found() == {
        "pretraining": found, "cosine": cosine, "falling": falling, "spaced": None,
        "downstream": starts, "bundles": {},
    }  # fmt: skip
    assert RunTrial(tiny("fashion-classes-cnn-batchnorm"), 3, tmp_path, None).found() == {
        "pretraining": None, "cosine": None, "falling": None, "spaced": None, "downstream": {},
        "bundles": {},
    }  # fmt: skip


@pytest.mark.usefixtures("_little_data")
def test_averages_are_those_of_the_checkpoints_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    monkeypatch.setattr(
        RunTrial, "_keep", lambda self, name, state: kept.setdefault(name, dict(state))
    )
    monkeypatch.setattr(RunTrial, "_value", lambda *arguments, **more: 0.5)
    trial = RunTrial(tiny(TEXT), 0, tmp_path, None)
    trial.pretraining()
    run = trial._training()
    total = 3 * 128 // 16  # 24 steps, so that 5 % is 1 step
    states = []
    for step in range(total - 4, total + 1):
        run.advance(step - run.done, protocol.warmed_up(total))
        states.append({n: t.clone() for n, t in run.model.state_dict().items()})
    for name, tensor in kept["last"].items():
        assert torch.equal(tensor, states[-1][name])
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(kept["average-5"][name].double(), mean, rtol=0, atol=1e-7)
        mean = torch.stack([state[name].double() for state in states[2:]]).mean(0)
        torch.testing.assert_close(kept["average-3"][name].double(), mean, rtol=0, atol=1e-7)
    assert not torch.equal(kept["annealed-20"]["head.weight"], kept["longer-20"]["head.weight"])


def test_a_rate_that_falls_over_the_whole_run_is_the_one_computed_by_hand() -> None:
    rate = protocol.decayed(40, lambda share: 1 - share)
    # Two steps of warm-up, then 38 of which each has the rate in its middle.
    assert [rate(0), rate(1)] == [0.5, 1.0]
    assert rate(2) == pytest.approx(1 - 0.5 / 38)
    assert rate(21) == pytest.approx(1 - 19.5 / 38)
    assert rate(39) == pytest.approx(0.5 / 38)


@pytest.mark.usefixtures("_little_data")
def test_averages_of_a_falling_run_are_those_of_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def value(self: RunTrial, state: dict[str, Tensor], again: bool = False) -> float:
        seen.append(state["head.weight"].double())
        return float(len(seen) - 1)

    monkeypatch.setattr(RunTrial, "_value", value)
    trial = RunTrial(tiny(TEXT), 0, tmp_path, None)
    found = trial.falling()
    run = trial._training()
    total = 3 * 128 // 16  # 24 steps: 2 % and 4 % are 1 step, 8 % are 2, and so is the warm-up's 1
    states = []
    for step in range(total):
        share = (step - 1 + 0.5) / (total - 1)
        rate = 1.0 if step < 1 else 1 - share
        run.advance(1, lambda _, rate=rate: rate)  # type: ignore[misc]
        states.append(run.model.state_dict()["head.weight"].double().clone())
    torch.testing.assert_close(seen[int(found["value"])], states[-1], rtol=0, atol=1e-7)
    mean = torch.stack(states[-1::-2][:5]).mean(0)
    swept = seen[int(found["sweep"]["5"]["0.08"])]
    torch.testing.assert_close(swept, mean, rtol=0, atol=1e-7)
    shares = torch.tensor([2.0 ** (-k / 2) for k in range(5)], dtype=torch.float64)
    weighted = torch.einsum("k,kij->ij", shares / shares.sum(), torch.stack(states[-1:-6:-1]))
    spaced = seen[int(found["spaced"]["0.02"])]
    torch.testing.assert_close(spaced, weighted, rtol=0, atol=1e-7)
    assert not torch.equal(swept, states[-1])


# --- bundles -----------------------------------------------------------------------------------


def settle_bundle(folder: Path, trajectory: TrajectoryKind = TrajectoryKind.RUN) -> str:
    """An untaught hyper-model, which is the mean of five checkpoints."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_bundle(SettleBundle.of(Settle(5), {}, trajectory), folder)
    return str(folder)


@pytest.mark.usefixtures("_little_data")
@pytest.mark.parametrize("task", [TEXT, "fashion-classes-cnn-batchnorm"])
def test_a_bundle_that_is_the_mean_is_measured_as_the_mean(tmp_path: Path, task: str) -> None:
    path = settle_bundle(tmp_path / "mine")
    trial = RunTrial(tiny(task), 1, tmp_path / "work", None)
    values = trial.pretraining()["values"]
    found = trial.bundle("mine", path)
    assert found["value"] == pytest.approx(values["average-5"]["closed"], abs=1e-5)
    if task == TEXT:  # of few images, accuracies may be the same
        assert found["value"] != values["last"]["stored"]
    assert trial.found({"mine": path})["bundles"] == {"mine": found}
    swept = trial.pretraining()["sweep"]["5"]
    assert found["sweep"] == pytest.approx(swept, abs=1e-5)
    spaced = trial.spaced()["sweep"]
    assert spaced.keys() == swept.keys()
    assert spaced["0.02"] == values["average-5-ema"]["closed"]
    assert not temporaries(trial.folder)


@pytest.mark.usefixtures("_little_data")
def test_bundles_stand_beside_the_averages(tmp_path: Path) -> None:
    path = settle_bundle(tmp_path / "mine")
    request = Request(folder=tmp_path, tasks=[tiny(TEXT)], seeds=2, wanted=Wanted(()))
    plain = list(running.evaluate(request, [RunMeasure.PRETRAINING]))
    assert "bundles" not in results.to_json(request, plain, {})["settings"]
    first = list(
        running.evaluate(replace(request, seeds=1), [RunMeasure.PRETRAINING], 1.0, {"mine": path})
    )
    outcomes = [*first, plain[1]]
    found = json.loads(json.dumps(results.to_json(request, outcomes, {})))
    assert found["settings"]["bundles"] == {"mine": load_bundle(Path(path)).digest}
    values = found["tasks"][TEXT]["values"]
    assert values["mine"]["predicted"][1] is None
    assert values["mine"]["predicted"][0] == pytest.approx(
        values["average-5"]["closed"][0], abs=1e-5
    )
    page = to_markdown(found)
    assert "### mine" in page
    assert "| task | mine − average-2 |" in page
    assert found["tasks"][TEXT]["bundles"]["mine"].keys() == {"0.01", "0.02", "0.04", "0.08"}
    assert f"({found['settings']['bundles']['mine']})" in page


def test_bundles_that_runs_cannot_be_measured_with_are_refused(
    tmp_path: Path, know: Command
) -> None:
    runs, forgettings = tmp_path / "runs", tmp_path / "forgettings"
    settle_bundle(runs)
    settle_bundle(forgettings, TrajectoryKind.FORGETTING)
    for arguments, words in (
        (["run", "--bundle", "average-3=./runs"], "average-3=…: is already the name of a start"),
        (["run", "--bundle", "mine=./none"], "./none"),
        (["run", "--bundle", "../../mine=./runs"], "../../mine=./runs: a name has no / or |"),
        (["run", "--bundle", "a|b=./runs"], "a|b=./runs: a name has no / or |; give it another"),
        (
            ["run", "--bundle", "mine=./forgettings"],
            "forgettings: was taught on forgettings, and here runs are measured; leave it out",
        ),
        (
            ["run", "--bundle", "mine=./runs", "--measure", "cosine"],
            "--bundle: is measured with the pre-training's own measure; give --measure pretraining",
        ),
        (
            ["branches", "--bundle", "mine=./runs"],
            "--bundle is for --trajectory forgetting and run,",
        ),
    ):
        done = know("eval", "--trajectory", *arguments, "-o", "out", cwd=tmp_path)
        assert done.returncode in (2, 3), done.stderr
        assert words in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_every_task_of_the_registry_has_a_length_of_its_own() -> None:
    small = {name for name, task in TASKS.items() if not task.large}
    assert set(plan._LENGTHS) == small
    for name in small:
        run = plan.for_run(TASKS[name])
        assert run.largest == plan._LENGTHS[name].samples
        assert run.name == name
    large = TASKS["cifar100-cifar10-resnet18"]
    assert plan.for_run(large) == large
    text = TASKS[TEXT]
    assert plan.for_run(text, 0.4).recipe.epochs == plan.for_run(text).recipe.epochs * 0.4
    assert plan.for_run(text, 0.001).recipe.epochs == 1


def test_images_of_cifar_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    examples = Examples(images, torch.tensor([1, 0]))
    monkeypatch.setattr("know_cli.evaluation.tasks.classification.load_images", lambda *a: 1 / 0)
    monkeypatch.setattr(cifar_tasks, "load_images", lambda *a: (examples, examples, 10))
    task = TASKS["cifar10-classes-resnet"]
    train, test, count = task.load("cifar10", None)  # type: ignore[attr-defined]
    assert train.inputs.shape == (2, 3, 2, 2)
    assert train.inputs[0, 0, 0, 0] == (0 + 1 + 4 + 5) / 4
    assert (test.targets.tolist(), count) == ([1, 0], 10)


# --- results -----------------------------------------------------------------------------------

LAST = [0.50, 0.60, 0.55, 0.65]
ANNEALED = [0.60, 0.70, 0.66, 0.74]
MEAN = [0.58, 0.68, 0.61, 0.71]


def test_the_recovered_gain_is_the_one_computed_by_hand() -> None:
    found = results.compare({"last": LAST, "annealed-20": ANNEALED, "average-5": MEAN})
    assert found.helps
    # (0.08 + 0.08 + 0.06 + 0.06) / (0.10 + 0.10 + 0.11 + 0.09)
    assert found.gains["average-5"].value == pytest.approx(0.28 / 0.40)
    assert found.gains["last"].value == 0
    assert found.gains["annealed-20"].value == 1
    # The lowest and highest ratio of means that four draws with repetition can have.
    assert (
        0.06 / 0.11 <= found.gains["average-5"].low < 0.7 < found.gains["average-5"].high <= 0.8001
    )
    difference = found.differences["average-5"]
    # Student's t with 3 degrees of freedom, 3.18245, times s/√4 with s² = 4 · 0.01² / 3.
    assert difference.value == pytest.approx(0.07)
    assert difference.half_width == pytest.approx(3.18245 * math.sqrt(4e-4 / 3) / 2, rel=1e-5)


def test_seeds_that_lack_a_measure_are_left_out_of_it() -> None:
    cosine = [0.7, None, 0.65, None]
    found = results.compare({"last": LAST, "annealed-20": ANNEALED, "cosine": cosine})
    assert found.seeds == 4
    assert found.means["cosine"] == pytest.approx(0.675)
    assert found.differences["cosine"].value == pytest.approx((0.20 + 0.10) / 2)
    assert found.gains["cosine"].value == pytest.approx(0.30 / 0.21)


def test_there_is_no_gain_where_annealing_does_not_help() -> None:
    found = results.compare(
        {"last": LAST, "annealed-20": [0.6, 0.5, 0.65, 0.55], "average-3": MEAN}
    )
    assert not found.helps
    assert found.gains == {}
    assert found.differences["average-3"].low > 0


def content() -> dict[str, Any]:
    """Results of two tasks: one with BatchNorm, a sweep and everything, one with the least."""
    measure = {"name": "accuracy", "unit": "points", "scale": 100.0}
    facts: dict[str, Any] = {
        "parameters": 1234, "samples": 100, "steps": 50, "tested": 40, "measure": measure,
        "downstream_measure": measure,
    }  # fmt: skip
    averaged = {average.name: {"closed": MEAN} for average in AVERAGES}
    values: dict[str, Any] = {
        "last": {"stored": LAST},
        "annealed-10": {"stored": ANNEALED},
        "annealed-20": {"stored": ANNEALED},
        "longer-10": {"stored": LAST},
        "longer-20": {"stored": LAST},
        **averaged,
    }
    plain = {
        "title": "one to another", "definition": {}, "facts": facts, "seeds": [0, 1, 2, 3],
        "seconds": [1.0] * 4, "values": values, "sweep": {}, "cosine": [None] * 4, "shape": {"parallel": [None] * 4, "kept": [None] * 4},
        "downstream": {},
    }  # fmt: skip
    again = {name: {**found, "re-estimated": MEAN} for name, found in values.items()}
    for name in ("average-3", "average-5"):
        again[name]["plain"] = LAST
    full = {
        **plain,
        "facts": {**facts, "cell": "50 images", "validated": 20, "downstream_tested": 30},
        "values": again,
        "sweep": {"2": {"0.01": MEAN, "0.08": LAST}},
        "cosine": [0.7, None, 0.65, None],
        "shape": {"parallel": [0.4, 0.4, 0.2, None], "kept": [0.9, 0.9, 1.0, None]},
        "downstream": {
            "last": {"values": LAST, "factors": [1.0, 1.0, 2.0, 0.5]},
            "average-3": {"values": MEAN, "factors": [1.0] * 4},
            "average-5": {"values": MEAN, "factors": [4.0] * 4},
            "annealed-20": {"values": [*ANNEALED[:3], None], "factors": [1.0] * 3 + [None]},
        },
    }
    of = {"processor": "P", "cores": 2, "system": "S", "python": "3", "torch": "2"}
    options = {"seeds": 4, "length": 0.25, "more": [0.1, 0.2], "warm_up": 0.05, "spacing": 0.05,
               "rates": [0.5, 1.0, 2.0, 4.0]}  # fmt: skip
    return {
        "format": 1, "trajectory": "run", "version": "1", "machine": of, "settings": options,
        "tasks": {"full": full, "plain": plain}, "not_run": {"other": "not found"},
    }  # fmt: skip


def test_the_page_has_averages_of_a_run_whose_rate_falls() -> None:
    found = content()
    spacings = ("0.01", "0.02", "0.08")
    found["tasks"]["full"]["falling"] = {
        "last": MEAN,
        "sweep": {
            "3": dict.fromkeys(spacings, ANNEALED),
            "5": {"0.01": MEAN, "0.02": [None, *ANNEALED[1:]], "0.08": LAST},
        },
        "spaced": dict.fromkeys(spacings, MEAN),
    }
    page = to_markdown(found)
    above = 100 * (sum(ANNEALED) - sum(MEAN)) / 4
    below = 100 * (sum(LAST) - sum(MEAN)) / 4
    section = page.split("### A run whose rate falls")[1].split("##")[0]
    (row,) = (line for line in section.splitlines() if line.startswith("| full |"))
    cells = [cell.split("±")[0].strip() for cell in row.split("|")[2:-1]]
    assert cells == [
        f"{-below:+.2f}", f"{above:+.2f}", "+3.33", "+0.00", f"{above:+.2f}", f"{below:+.2f}", "+0.00",
    ]  # fmt: skip
    assert "out of 1, on which the average" in section
    assert "| average-5 | 0, 0 | 0, 0 | 0, 1 |" in page
    assert "| average-3 | 1, 0 | 1, 0 | 1, 0 |" in page
    assert "| falling |" in page
    assert "### A run whose rate falls" not in to_markdown(content())


def test_the_page_has_bundles_beside_the_averages_by_spacing() -> None:
    """One that is the mean at the first spacing, and annealed at the last one."""
    found = content()
    found["settings"]["bundles"] = {"mine": "0123456789abcdef"}
    sweep = {"3": {"0.01": LAST, "0.08": MEAN}, "5": {"0.01": MEAN, "0.08": LAST}}
    for task in found["tasks"].values():
        task["values"]["mine"] = {"predicted": MEAN}
        task["bundles"] = {"mine": {"0.01": MEAN, "0.08": ANNEALED}}
        task["sweep"], task["spaced"] = sweep, {"0.01": LAST, "0.08": ANNEALED}
    page = to_markdown(found)
    mean = (sum(MEAN) - sum(LAST)) / (sum(ANNEALED) - sum(LAST))
    assert "### mine" in page
    zeros = " | ".join(["+0.00 ± 0.00"] * len(AVERAGES))
    assert page.count(f"| {zeros} |") == 2
    assert f"| above, of 2 |{' 0 |' * len(AVERAGES)}" in page
    assert f"| below |{' 0 |' * len(AVERAGES)}" in page
    both = [f"{mean:+.2f} ({mean:+.2f})", f"{(mean + 1) / 2:+.2f} ({(mean + 1) / 2:+.2f})"]
    assert f"| mine | {both[0]} | +1.00 (+1.00) | {both[1]} |" in page
    half = f"{mean / 2:+.2f} ({mean / 2:+.2f})"
    assert f"| average-5 | {both[0]} | +0.00 (+0.00) | {half} |" in page
    apart = "+0.50 (+0.50 to +0.50)"
    zero, one = "+0.00 (+0.00 to +0.00)", "+1.00 (+1.00 to +1.00)"
    assert f"| mine − average-5 | {zero} | {one} | {apart} |" in page
    three = [f"{gain:+.2f} ({gain:+.2f} to {gain:+.2f})" for gain in (mean, 1 - mean)]
    assert f"| mine − average-3 | {three[0]} | {three[1]} | {apart} |" in page
    assert f"| mine − average-5-ema | {three[0]} | {zero} | " in page
    # Tasks that were not swept have none by spacing.
    for task in found["tasks"].values():
        task["sweep"] = {}
    assert "| all |" not in to_markdown(found)


def test_the_page_has_the_numbers_of_the_results() -> None:
    page = to_markdown(content())
    assert "2 tasks, 4 seeds each, from 0" in page
    others = content()
    for task in others["tasks"].values():  # --seeds 5-8
        task["seeds"] = [5, 6, 7, 8]
    assert "2 tasks, 4 seeds each, from 5" in to_markdown(others)
    assert "`know eval --trajectory run --length 0.25`" in page
    assert "annealing by 20 % more steps is significantly better than the last checkpoint on 2 of 2" in page  # fmt: skip
    assert "`average-5`, for the model itself, recovers +0.70 (+0.70 to +0.70) of annealing" in page
    # Of the seeds that have it: (0.08 + 0.08 + 0.06) / 0.31 downstream.
    assert "`average-5`, as a start: significantly above" not in page
    assert "| [full](#full) | accuracy | 3 | 57.50 | +10.33 ± 1.43 |" in page
    assert (
        "| average-5 | 2 | +0.70 (+0.70 to +0.70) | +0.70 | +0.70 | +0.70 (+0.70 to +0.70) | 2 | 0 |"
        in page
    )
    assert "| 2 checkpoints | +7.00 ± 1.84 | +0.00 ± 0.00 |" in page
    assert "| full | 1 % | 8 % |" in page
    assert (
        "| | 1 % | 8 % |\n|---|---:|---:|\n| 2 checkpoints | +0.70 (+0.70) | +0.00 (+0.00) |"
        in page
    )
    assert "| average-5 | 0 | 0 | 0 | 4 |" in page
    assert "| annealed-20 | 0 | 3 | 0 | 0 |" in page
    assert "| other | not found |" in page
    assert "after fine-tuning on 50 images" in page
    # Where steps are parallel beyond 0.3, two runs are warned of; none lost.
    assert "| full | +0.33 | 0.933 |" in page
    assert "| +0.00 | 3 | 0 (0 %) | 0 |  |" in page
    assert "| +0.30 | 2 | 0 (0 %) | 1 | 0 (0 %) |" in page
    assert page.count("### Running statistics") == 1


def test_a_sweep_may_lack_seeds() -> None:
    sweep = {"2": {"0.01": 0.5}}
    assert results._sweep([{}, sweep, {}]) == {"2": {"0.01": [None, 0.5, None]}}
    assert results._sweep([{}, {}]) == {}


def test_results_are_read_and_others_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(content()))
    assert results.read_results(path) == content()
    for wrong in ({"format": 1}, content() | {"format": 2}, content() | {"trajectory": "x"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=r"runs\.json: is not a result of .*--trajectory run"):
            results.read_results(path)
    lacking = content()
    del lacking["tasks"]["full"]["values"]["annealed-20"]
    path.write_text(json.dumps(lacking))
    with pytest.raises(UsageError, match="is not a result"):
        results.read_results(path)
    with pytest.raises(UsageError, match="cannot be read"):
        results.read_results(tmp_path / "none.json")


@pytest.mark.usefixtures("_little_data")
def test_what_was_measured_before_is_shown_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = ("last", "average-3", "annealed-20")
    for module in (running, protocol):
        monkeypatch.setattr(module, "DOWNSTREAM", starts)
    request = Request(folder=tmp_path, tasks=[tiny(TEXT)], seeds=2, wanted=Wanted(()))
    (first, second) = running.evaluate(request, [RunMeasure.PRETRAINING])
    assert first.found["cosine"] is None
    assert [first.seed, second.seed] == [0, 1]
    list(running.evaluate(replace(request, seeds=1), [RunMeasure.COSINE, RunMeasure.DOWNSTREAM]))
    outcomes = list(running.evaluate(request, [RunMeasure.PRETRAINING]))
    found = json.loads(json.dumps(results.to_json(request, outcomes, {"other": "no data"})))
    task = found["tasks"][TEXT]
    assert task["seeds"] == [0, 1]
    assert task["cosine"][0] is not None
    assert task["cosine"][1] is None
    assert set(task["downstream"]) == set(starts)
    for start in task["downstream"].values():
        assert start["values"][1] is None
        assert start["factors"][0] in plan.RATES
    assert np.isfinite(task["values"]["average-3"]["closed"]).all()
    assert found["not_run"] == {"other": "no data"}
    assert f"## {TEXT}" in to_markdown(found)


# --- the command -------------------------------------------------------------------------------


def test_options_of_forgettings_are_refused(tmp_path: Path, know: Command) -> None:
    for arguments, words in (
        (["--trajectory", "run", "--method", "average"], "--method is for --trajectory forgetting"),
        (["--trajectory", "run", "--steps", "3"], "--steps is for --trajectory forgetting"),
        (["--measure", "cosine"], "--measure is for --trajectory run"),
        (["--length", "2"], "--length is for --trajectory run"),
    ):
        done = know("eval", *arguments, "-o", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert words in one_line(done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.evaluation.test_runs import TEXT, tiny\n"
        "from know_cli.evaluation import tasks\n"
        "from know_cli.evaluation.runs import plan\n"
        "plan._LENGTHS.clear()\n"
        "tasks.TASKS[TEXT] = tiny(TEXT)\n"
        "from know_cli.cli.main import know\n"
        "know()\n"
    )
    command = [sys.executable, str(script), "eval", "--trajectory", "run", "--task", TEXT,
               "--seeds", "2", "--processes", "1", "--table", "r.md", "-o", "out", "--force"]  # fmt: skip

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert f"{TEXT}, seed 1: 2 of 2" in done.stderr
    assert "wrote out/runs.json" in done.stdout
    first = (tmp_path / "out" / "runs.json").read_text()
    assert (tmp_path / "r.md").read_text() == to_markdown(json.loads(first))
    assert run().returncode == 0
    assert (tmp_path / "out" / "runs.json").read_text() == first


def test_all_averages_are_of_checkpoints_that_a_run_keeps() -> None:
    assert max(average.count for average in AVERAGES) == plan.CHECKPOINTS
    assert set(averages._DECAYS) <= set(SHAPES)
    assert set(DOWNSTREAM) <= ARMS


# --- committed results -------------------------------------------------------------------------

DOCS = Path(plan.__file__).parents[3] / "docs"


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    for name in ("runs.json", "runs-settle.json", "runs-falling.json"):
        path = DOCS / "results" / name
        assert to_markdown(results.read_results(path)) == path.with_suffix(".md").read_text()


def test_the_tables_for_readers_are_those_of_the_committed_pages() -> None:
    published = "".join(page.read_text() for page in (DOCS / "results").glob("*.md"))
    lines = [line for line in (DOCS / "averages.md").read_text().splitlines() if line[:1] == "|"]
    assert len(lines) > 20
    for line in lines:
        assert line in published.splitlines(), line


def test_what_is_said_of_rates_that_fall_is_what_was_measured() -> None:
    tasks = results.read_results(DOCS / "results" / "runs-falling.json")["tasks"]
    page = " ".join((DOCS / "averages.md").read_text().replace("−", "-").split())
    assert all(task["seeds"] == list(range(6)) for task in tasks.values())
    assert len(tasks) == 18

    def beside_its_end(spacing: str) -> dict[str, Estimate]:
        return {
            name: results.difference(
                task["falling"]["sweep"]["5"][spacing], task["falling"]["last"]
            )
            for name, task in tasks.items()
        }

    near, far = beside_its_end("0.02"), beside_its_end("0.08")
    assert not any(found.low > 0 for found in (*near.values(), *far.values()))
    worse = {name: -100 * found.value for name, found in near.items() if found.high < 0}
    texts = {name: worse.pop(name) / 100 for name in ("text-language-model", "text-lora")}
    ((_, points),) = worse.items()
    assert (
        f"worse on three: on one by {points:.1f} points, on the language models by "
        f"{max(texts.values()):.3f} nats at most"
    ) in page
    worse = {name: -100 * found.value for name, found in far.items() if found.high < 0}
    assert len(worse) == 9
    nats = {name: worse.pop(name) / 100 for name in texts}
    said = (
        f"worse on nine, by up to {max(worse.values()):.1f} points, and by {max(nats.values()):.3f}"
    )
    assert f"{said} nats on the language model, and better on none" in page

    beside_constant = {
        name: results.difference(values["average-5"], values["falling"])
        for name, values in ((n, results.pretraining_values(task)) for n, task in tasks.items())
    }
    better = {name: found.value for name, found in beside_constant.items() if found.low > 0}
    assert not any(found.high < 0 for found in beside_constant.values())
    texts = {name: better.pop(name) for name in texts}
    assert (
        f"on {len(better) + 2} of the 18 tasks, by {100 * min(better.values()):.1f} to "
        f"{100 * max(better.values()):.1f} points and by {texts['text-language-model']:.2f} and "
        f"{texts['text-lora']:.2f} nats, and worse on none"
    ) in page
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert (
        f"On {len(better) + 2} of the eighteen, whose runs are short, a run at a constant" in readme
    )
