"""``know train --objective network``: runs in memory, the gradient, resuming, and what is gained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from know_cli.cli.train_network import best_average_of, network_markdown
from know_cli.errors import EXIT_OUTPUT, CheckpointError, UsageError
from know_cli.evaluation.statistics import interval_half_width
from know_cli.lab.averaging import combine
from know_cli.lab.data import load
from know_cli.lab.data.parts import meta_part
from know_cli.lab.data.samples import reduced
from know_cli.lab.fitting import one_thread
from know_cli.meta.network_bundle import split_runs
from know_cli.meta.network_data import NetworkRun, find_runs, load_runs, outputs
from know_cli.meta.network_gains import Interval, Measured, averages, gains
from know_cli.meta.network_loading import load_networks
from know_cli.meta.network_models import NetworkModel, SettleModel, new_model, save_bundle, settled
from know_cli.meta.network_settings import HyperModel, NetworkSettings
from know_cli.meta.network_training import _differentiable, teach
from know_cli.meta.recording import Task, unseen_samples
from know_cli.meta.run_recording import record_run
from know_cli.meta.run_setup import RunSetup, draw_run_setup
from know_cli.settle.bundle import load_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line

SETTINGS = NetworkSettings(checkpoints=3, hidden=4, steps=4, runs=2, batch=16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def setup(architecture: str, seed: int) -> RunSetup:
    drawn = draw_run_setup(
        seed, {"digits": load("digits")}, [architecture], checkpoints=5, brief=True
    )
    return replace(
        drawn, steps=30, end=20, spacing=2, samples=60, batch_size=8, warm_up=2, classes=(0, 1, 2, 3, 4),
        design=replace(drawn.design, classes=5) if drawn.design.classes != 5 else drawn.design,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short runs on the digits."""
    made = tmp_path_factory.mktemp("runs")
    with one_thread():
        for number, architecture in enumerate(("mlp", "mlp", "mlp", "cnn")):
            record_run(setup(architecture, 40 + number), load("digits"), made / f"{number:05d}")
    return made


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[NetworkRun]:
    return load_runs(find_runs([folder]), 3, None)[0]


def test_unseen_samples_are_none_of_the_run_s(runs: list[NetworkRun]) -> None:
    data = load("digits")
    for run in runs:
        task = Task(run.setup, data)
        trained = {row.numpy().tobytes() for row in task.inputs}
        assert len(run.labels) == sum(
            int((meta_part(data).labels == c).sum()) for c in run.setup.classes
        ) - len(task.labels)
        # The next ones in the task's own order, none of which it trains on.
        assert torch.equal(run.inputs[: len(task.start_labels)], task.start_inputs[:2000])
        assert torch.equal(run.labels[: len(task.start_labels)], task.start_labels)
        twice = sum(row.numpy().tobytes() in trained for row in run.inputs)
        assert twice <= 2  # digits that look the same
    inputs, labels = unseen_samples(runs[0].setup, data, 7)
    assert len(inputs) == len(labels) == 7


def test_windows_are_all_that_fit(runs: list[NetworkRun]) -> None:
    run = runs[0]
    assert run.windows(3) == [(1, 0), (1, 1), (1, 2), (2, 0)]
    far = run.window(3, 2, 0)
    assert far.target is run.annealed
    for state, position in zip(far.states, (0, 2, 4), strict=True):
        assert state is run.states[position]
    assert run.window(3, 1, 2).target is None


def test_an_untaught_one_predicts_the_average_as_a_prediction_has_it(
    runs: list[NetworkRun],
) -> None:
    for run in runs:
        window = run.window(3, 1, 0)
        weights, coefficients = settled(Settle(3), window)
        mean = combine(window.states, [1 / 3] * 3)
        assert coefficients.tolist() == pytest.approx([1 / 3] * 3)
        assert weights
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-6)


def test_the_gradient_goes_through_running_statistics() -> None:
    layer = torch.nn.BatchNorm1d(3).eval()
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    numbers = torch.tensor(0.7, dtype=torch.float32, requires_grad=True)

    def state(c: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.tensor([1.0, 2.0, 3.0]), "bias": torch.tensor([0.5, 0.0, -1.0]),
            "running_mean": c * torch.tensor([1.0, -2.0, 0.3]),
            "running_var": c * torch.tensor([0.4, 2.0, 1.0]),
        }  # fmt: skip

    found = torch.func.functional_call(layer, _differentiable(state(numbers)), (inputs,))
    with torch.no_grad():
        plain = torch.func.functional_call(layer, state(numbers), (inputs,))
    torch.testing.assert_close(found, plain)
    (got,) = torch.autograd.grad(found.square().sum(), numbers)
    with torch.no_grad():
        ends = [
            torch.func.functional_call(layer, state(numbers + h), (inputs,)).square().sum()
            for h in (1e-3, -1e-3)
        ]
    assert float(got) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("changes", [{}, {"width": 3, "distance": 0.5, "batch_statistics": True}])
def test_an_interrupted_training_ends_as_a_whole_one(
    changes: dict[str, int], runs: list[NetworkRun], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    made, _ = teach(runs, settings, every=2)
    whole = made.module.state_dict()

    def interrupt(step: int, loss: float, model: NetworkModel) -> str:
        assert math.isfinite(loss)
        if step == 4:
            raise KeyboardInterrupt
        return f"first {step}"

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        teach(runs, settings, interrupt, every=2, partial=partial)

    def tell(step: int, loss: float, model: NetworkModel) -> str:
        return f"then {step}"

    again, told = teach(runs, settings, tell, every=2, partial=partial)
    assert told == ["first 2", "then 4"]
    assert all(torch.equal(again.module.state_dict()[name], whole[name]) for name in whole)
    assert float(whole["gate.weight"].abs().max()) > 0
    # What was kept of another training is not gone on with.
    other, told = teach(runs, replace(settings, seed=1), tell, every=2, partial=partial)
    assert told == ["then 2", "then 4"]
    assert not torch.equal(other.module.state_dict()["read.weight"], whole["read.weight"])


def test_the_loss_that_is_told_is_a_mean_also_with_other_reports(
    runs: list[NetworkRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(model: SettleModel, *_: object) -> tuple[torch.Tensor, float]:
        return model.module.read.weight.square().sum(), 1.0

    monkeypatch.setattr("know_cli.meta.network_training._loss", stand_in)
    settings, partial = replace(SETTINGS, steps=7), tmp_path / "partial"

    def interrupt(step: int, loss: float, model: NetworkModel) -> float:
        if step == 6:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        teach(runs, settings, interrupt, every=2, partial=partial)
    # Kept at step 4, and told of again at 5 and 7: after one step, and after two.
    _, told = teach(runs, settings, lambda step, loss, model: loss, every=5, partial=partial)
    assert told == [1.0, 1.0, 1.0, 1.0]


def test_a_curve_is_not_gone_on_with_on_other_runs_or_versions(
    runs: list[NetworkRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "partial"

    def told(name: str, of: tuple[str, ...]) -> list[str]:
        _, found = teach(
            runs,
            SETTINGS,
            lambda step, loss, model: f"{name} {step}",
            every=2,
            partial=partial,
            reported_of=of,
        )
        return found

    assert told("first", ("a", "b")) == ["first 2", "first 4"]
    assert told("same", ("b", "a")) == ["first 2", "first 4"]
    # One more that was held out would make a curve of two different means.
    assert told("more", ("a", "b", "c")) == ["more 2", "more 4"]
    monkeypatch.setattr("know_cli.meta.network_training.versions", lambda: {"torch": "another"})
    assert told("newer", ("a", "b", "c")) == ["newer 2", "newer 4"]


def test_it_learns_to_lower_the_loss(runs: list[NetworkRun]) -> None:
    run = runs[:1]
    before = _loss(run[0], SettleModel(Settle(3)))
    taught, _ = teach(run, replace(SETTINGS, steps=25, runs=1, batch=400, learning_rate=0.03))
    assert _loss(run[0], taught) < before - 1e-3


def test_known_is_taught_on_runs_as_well(
    runs: list[NetworkRun], folder: Path, know: Command, tmp_path: Path
) -> None:
    """Normalisation layers, running statistics with them, stay those of the last checkpoint."""
    settings = replace(
        SETTINGS, model=HyperModel.KNOWN, steps=25, runs=1, batch=400, learning_rate=3e-3
    )
    taught, _ = teach(runs[:1], settings)
    assert _loss(runs[0], taught) < _loss(runs[0], new_model(settings)) - 1e-3
    of_statistics = [name for name in runs[3].states[-1] if "running" in name]
    assert not set(of_statistics) & set(taught.predicted(runs[3].window(3, 1, 0)))
    save_bundle(taught.bundle({}, runs[0].trajectory), tmp_path / "mine", replace=False)
    found = sorted((folder / "00000").glob("*.safetensors"))
    names = [path for path in found if not path.stem.startswith("annealed")][-3:]
    done = know(
        "predict", *names, "-o", tmp_path / "out.safetensors", "--trajectory", "run",
        "--weights", tmp_path / "mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "KNOWN network" in done.stdout


def _loss(run: NetworkRun, model: NetworkModel) -> float:
    with torch.no_grad():
        losses = []
        for apart, back in run.windows(3):
            window = run.window(3, apart, back)
            state = {**window.states[-1], **model.predicted(window)}
            found = outputs(run, state, run.inputs)
            losses.append(float(torch.nn.functional.cross_entropy(found, run.labels)))
    return sum(losses) / len(losses)


def test_runs_are_split_by_their_names(runs: list[NetworkRun]) -> None:
    split = split_runs(runs, 0.5, 3, ["cnn"])
    assert [run.setup.design.architecture for run in split.held_out["architectures"]] == ["cnn"]
    assert len(split.training) + len(split.held_out.get("runs", [])) == 3
    fewer = split_runs(runs[1:], 0.5, 3, ["cnn"])
    assert {run.name for run in fewer.training} <= {run.name for run in split.training}
    with pytest.raises(UsageError, match="cannot hold out architecture 'vit': there are cnn"):
        split_runs(runs, 0.5, 0, ["vit"])
    with pytest.raises(UsageError, match="4 runs cannot be split with a share of 0 held out"):
        split_runs(runs, 0.0, 0)


def test_gains_are_paired_by_run() -> None:
    def entry(run: str, last: float, mean: float, settle: float) -> dict[str, object]:
        return {
            "run": run,
            "measured": {
                name: Measured(1 - value / 100, value)
                for name, value in (
                    ("last", last),
                    ("average-3", mean),
                    ("annealed-20", 90.0),
                    ("settle", settle),
                )
            },
        }

    found = gains(
        [entry("a", 50, 52, 55), entry("a", 50, 54, 55), entry("b", 70, 71, 73)], "settle"
    )
    assert found.runs == 2
    assert found.accuracy["settle"].mean == pytest.approx(4)
    assert found.ahead["average-3"].mean == pytest.approx(2)
    # Over 2 and 2 points there is no deviation; over 5 and 3 it is √2, and t₁ is 12.71.
    assert found.ahead["average-3"].half == pytest.approx(0)
    assert found.accuracy["settle"].half == pytest.approx(12.71)
    assert found.ahead_loss["average-3"].mean == pytest.approx(0.02)
    assert best_average_of(found.to_json()) == "average-3"
    assert found.to_json()["ahead"]["last"] == [4.0, 12.71]
    assert Interval.of([3.0]) == Interval(3.0, math.inf)


@pytest.mark.parametrize("count", [2, 5, 20, 31, 32, 34, 53, 99, 500])
def test_intervals_are_students_for_any_number_of_runs(count: int) -> None:
    values = [float(number % 7) for number in range(count)]
    # Those of few runs are from a table of two decimal places.
    tolerance = 1e-4 if count > 31 else 3e-3
    assert Interval.of(values).half == pytest.approx(interval_half_width(values), rel=tolerance)


def test_averages_to_compare_with_sum_to_1() -> None:
    assert set(averages(3)) == {"average-2", "average-3", "average-3-ema", "average-3-linear"}
    assert averages(3)["average-3-ema"] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert averages(5)["average-3"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    assert all(sum(one) == pytest.approx(1) for one in averages(5).values())


def test_images_are_reduced_by_areas() -> None:
    data = load("digits")
    small = reduced(data, 4)
    assert small.shape == (1, 4, 4)
    first = data.train.inputs[0, 0].double().view(4, 2, 4, 2).mean((1, 3)).round()
    assert torch.equal(small.train.inputs[0, 0].double(), first)
    assert reduced(data, 8) is data
    assert reduced(data, None) is data


def test_the_command_trains_a_bundle(know: Command, folder: Path, tmp_path: Path) -> None:
    arguments = [
        "train", folder, "-o", tmp_path / "bundle", "--objective", "network", "--checkpoints", 3,
        "--meta-steps", 3, "--runs-per-step", 2, "--hold-out-architecture", "cnn", "--holdout", 0.4,
        "--seed", 3, "--json", tmp_path / "gains.json", "--table", tmp_path / "gains.md",
    ]  # fmt: skip
    done = know(*arguments)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3" in done.stderr
    assert "average-3-ema" in done.stdout
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.checkpoints, bundle.manifest["trajectory"]) == (3, "run")
    names = bundle.manifest["held_out"]
    assert len(names["architectures"]) == 1
    assert not {*names["architectures"], *names.get("runs", [])} & {*bundle.manifest["taught_on"]}
    kept = json.loads((tmp_path / "gains.json").read_text())
    assert kept["gains"] == bundle.manifest["gains"]
    assert (tmp_path / "gains.md").read_text() == network_markdown(kept)
    assert "| average-3-ema |" in (tmp_path / "gains.md").read_text()
    assert [point["step"] for point in kept["curve"]] == [3]
    assert not (tmp_path / "bundle.partial").exists()
    # Measured alone, on what it was not taught on, it gains what it did in the end.
    facts = tmp_path / "again.json"
    done = know(
        "train",
        folder,
        "--objective",
        "network",
        "--evaluate",
        tmp_path / "bundle",
        "--json",
        facts,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(facts.read_text())
    assert measured["gains"] == kept["gains"]
    assert measured["held_out"] == kept["held_out"]
    # What is not its own where it keeps what it learned is neither replaced nor removed.
    (tmp_path / "bundle.partial").write_text("precious")
    again = know(*arguments, "--force")
    assert again.returncode == EXIT_OUTPUT
    assert "bundle.partial: is where the training keeps" in one_line(again.stderr)
    assert (tmp_path / "bundle.partial").read_text() == "precious"
    (tmp_path / "bundle.partial").unlink()
    again = know(*arguments, "--force")
    assert again.returncode == 0, again.stderr
    assert load_bundle(tmp_path / "bundle").digest == bundle.digest


def test_the_command_teaches_to_read_roles(know: Command, folder: Path, tmp_path: Path) -> None:
    bundle, page = tmp_path / "bundle", tmp_path / "page.md"
    done = know(
        "train", folder, "-o", bundle, "--objective", "network", "--checkpoints", 3, "--roles",
        "--meta-steps", 2, "--holdout", 0.4, "--seed", 3, "--hold-out-architecture", "cnn",
        "--table", page,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = load_bundle(bundle)
    assert loaded.roles
    assert loaded.manifest["settings"]["roles"] is True
    assert "in 2 steps of 8 runs, reading roles; " in page.read_text()
    done = know("train", folder, "--objective", "network", "--evaluate", bundle)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_taught_on_is_said(know: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    found = know("train", tmp_path / "none", "-o", tmp_path / "b", "--objective", "network")
    assert "holds no collected forgettings, runs or branches; record some" in one_line(found.stderr)
    network = ("--objective", "network", "--evaluate")
    found = know("train", folder, *network, "a", "--evaluate", "b")
    assert found.returncode == 2
    assert "--objective network: measures one bundle" in one_line(found.stderr)
    found = know("train", folder, *network, tmp_path)
    assert "holds no hyper-model (manifest.json)" in one_line(found.stderr)
    runs, left_out = load_runs(find_runs([folder]), 6, None)
    assert not runs
    assert set(left_out.values()) == {"fewer than 6 checkpoints"}
    with pytest.raises(UsageError, match="00000-.* is there more than once; give different"):
        load_networks([folder, folder / "00000"], 3, None)
    with pytest.raises(UsageError, match="no runs are left to learn from"):
        teach([], SETTINGS)
    with pytest.raises(UsageError, match="diverged in step 1, at .*; lower --learning-rate"):
        spoilt = next(iter(load_runs(find_runs([folder]), 3, None)[0]))
        teach([replace(spoilt, inputs=spoilt.inputs * math.nan)], SETTINGS)
    broken = tmp_path / "runs" / "00000"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read .*delete its folder"):
        load_runs(find_runs([tmp_path / "runs"]), 3, None)
