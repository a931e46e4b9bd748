"""``know train --objective network`` on forgettings: whole networks from collected files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from know_cli.checkpoints.metadata import TrajectoryKind
from know_cli.checkpoints.state import read_state
from know_cli.cli.train_network import network_markdown
from know_cli.engine.settings import NormMode
from know_cli.errors import CheckpointError, UsageError
from know_cli.evaluation.variants import Variant, is_available, method_of, of_bundle, predict
from know_cli.forgetting.recorder import checkpoint_name
from know_cli.kinds import PREDICTED_KINDS, Kind
from know_cli.lab.averaging import combine
from know_cli.lab.data import load
from know_cli.lab.data.parts import meta_part
from know_cli.lab.data.samples import reduced
from know_cli.lab.fitting import one_thread
from know_cli.meta.network_bundle import split_runs, teach_bundle
from know_cli.meta.network_data import NetworkRun, outputs
from know_cli.meta.network_forgettings import _states
from know_cli.meta.network_gains import HeldOut, forgotten, measure
from know_cli.meta.network_loading import load_networks
from know_cli.meta.network_models import SettleModel, settled
from know_cli.meta.network_settings import NetworkSettings
from know_cli.meta.recording import Task, first_network, record_trajectory, unseen_samples
from know_cli.meta.series import Series, load_series, save_series
from know_cli.meta.setup import Start
from know_cli.settle.bundle import SettleBundle, load_bundle, save_bundle
from know_cli.settle.module import Settle
from tests.support.command import Command, one_line
from tests.support.recorded import brief_setup, collect_brief

SETTINGS = NetworkSettings(checkpoints=3, hidden=4, steps=3, runs=2, batch=16)
_DATA = "digits"
#: Small ones, by architecture and seed; the last two have BatchNorm.
NETWORKS = (("mlp", 50), ("mlp", 54), ("mlp", 64), ("cnn", 70))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of four collected forgettings, and the checkpoints that these are of."""
    return collect_brief(tmp_path_factory.mktemp, NETWORKS)


@pytest.fixture(scope="module")
def networks(recorded: tuple[Path, Path]) -> list[NetworkRun]:
    found, left_out = load_networks([recorded[0]], 3, None)
    assert not left_out
    return found


def test_networks_are_those_that_were_recorded(
    networks: list[NetworkRun], recorded: tuple[Path, Path]
) -> None:
    assert [run.setup.design.architecture for run in networks] == [one for one, _ in NETWORKS]
    for number, run in enumerate(networks):
        assert run.trajectory is TrajectoryKind.FORGETTING
        assert run.annealed is None
        # Θ0 is the newest of them, as a prediction has it.
        for index, state in enumerate(reversed(run.states)):
            whole = read_state(recorded[1] / f"{number:05d}" / checkpoint_name(index))
            wanted = {name for name in whole if "running" not in name and "num_" not in name}
            assert set(state) == wanted
            for name in wanted:
                assert torch.equal(state[name], whole[name]), name


def test_batch_norm_takes_the_statistics_of_the_batch(networks: list[NetworkRun]) -> None:
    run = networks[-1]
    data = reduced(load(_DATA), run.setup.design.inputs.side)
    inputs = Task(run.setup, data).test_inputs[:40]
    found = outputs(run, run.states[-1], inputs)
    # A layer that normalises by the batch has another answer where the batch is another one.
    parts = torch.cat([outputs(run, run.states[-1], part) for part in inputs.split(20)])
    assert not torch.allclose(found, parts, atol=1e-3)
    # Of one sample more than two parts have, none is left alone.
    odd = replace(networks[2], inputs=networks[2].inputs.repeat(4, 1, 1, 1)[:501])
    odd = replace(odd, labels=networks[2].labels.repeat(4)[:501])
    assert math.isfinite(measure(odd, odd.states[-1]).loss)
    mlp = networks[0]
    inputs = Task(mlp.setup, reduced(load(_DATA), mlp.setup.design.inputs.side)).test_inputs[:40]
    parts = torch.cat([outputs(mlp, mlp.states[-1], part) for part in inputs.split(20)])
    torch.testing.assert_close(outputs(mlp, mlp.states[-1], inputs), parts)


def test_unseen_samples_are_none_of_a_session_s(networks: list[NetworkRun]) -> None:
    for run in networks:
        task = Task(run.setup, reduced(load(_DATA), run.setup.design.inputs.side))
        trained = {row.numpy().tobytes() for row in task.inputs}
        twice = sum(row.numpy().tobytes() in trained for row in run.inputs)
        assert twice <= 2  # digits that look the same
        assert len(run.labels) >= 200


@pytest.mark.parametrize("start", ["fresh", "pretrained"])
def test_common_starts_are_as_they_were_recorded(start: Start, tmp_path: Path) -> None:
    data = load(_DATA)
    drawn = replace(brief_setup("mlp", 64), start=start)
    # Digits are few: what a start was pretrained on is none of what nobody has seen.
    task, (inputs, labels) = Task(drawn, data), unseen_samples(drawn, data, 2000)
    used = len(task.start_labels) if start == "pretrained" else 0
    known = {row.numpy().tobytes() for row in (*task.inputs, *task.start_inputs[:used])}
    assert sum(row.numpy().tobytes() in known for row in inputs) <= 2
    total = int(torch.isin(meta_part(data).labels, torch.tensor(drawn.classes)).sum())
    assert len(labels) == total - 60 - used
    series = record_trajectory(drawn, data, tmp_path / "recorded", rows_per_tensor=40_000)
    save_series(series, tmp_path / "00000.safetensors")
    found, left_out = load_networks([tmp_path / "00000.safetensors"], 3, None)
    if not found:  # after a pretraining on all that there is, nothing may be left unseen
        assert "samples that it has not seen" in next(iter(left_out.values()))
        return
    (run,) = found
    for index, state in enumerate(reversed(run.states)):
        whole = read_state(tmp_path / "recorded" / checkpoint_name(index))
        assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


def test_what_never_moves_is_as_the_first_session_had_it() -> None:
    """Or unknown, after a pretraining."""
    for start in (None, "fresh", "pretrained"):
        drawn = replace(brief_setup("mlp", 50), start=cast(Start | None, start))
        model = first_network(drawn)
        names = [name for name, _ in model.named_parameters()]
        moved = [name for name in names if name != "fc1.bias"]
        tables = {kind: np.empty((0, 4), np.float32) for kind in PREDICTED_KINDS}
        numbers = {kind: np.empty(0, np.int32) for kind in PREDICTED_KINDS}
        tables[Kind.FC] = np.concatenate(
            [np.repeat(model.state_dict()[name].numpy().reshape(-1, 1), 4, 1) + 1 for name in moved]
        )
        numbers[Kind.FC] = np.repeat(
            np.arange(len(moved)), [model.state_dict()[name].numel() for name in moved]
        ).astype(np.int32)
        series = Series((0, 1, 2, 3), tables, numbers, tuple(moved), {})
        if start == "pretrained":
            with pytest.raises(
                Exception, match=r"tensor 'fc1\.bias', which never moves, is not kept"
            ):
                _states(series, model, drawn)
            continue
        for state in _states(series, model, drawn):
            assert torch.equal(state["fc1.bias"], model.state_dict()["fc1.bias"])
            assert torch.equal(state["fc1.weight"], model.state_dict()["fc1.weight"] + 1)
    starts = [first_network(replace(brief_setup("mlp", 50), start=one)) for one in (None, "fresh")]
    assert not torch.equal(*(next(one.parameters()) for one in starts))


def test_a_prediction_is_what_was_taught(
    networks: list[NetworkRun], recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    """With coefficients that differ, so that the order of the checkpoints matters."""
    torch.manual_seed(0)
    model = Settle(3)
    nn.init.normal_(model.gate.weight, std=0.3)
    save_bundle(SettleBundle.of(model, {}, TrajectoryKind.FORGETTING), tmp_path / "bundle")
    paths = [recorded[1] / "00000" / checkpoint_name(k) for k in range(3)]
    variant = of_bundle("taught", str(tmp_path / "bundle"))
    assert find_method_name(variant) == "settle"
    run = networks[0]
    with torch.no_grad():
        wanted, coefficients = settled(model, run.window(3, 1, 0))
    assert float(coefficients.max() - coefficients.min()) > 0.05
    found = predict(variant, paths, NormMode.AVERAGE, 1, rate=0.8)[1]
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    # A family of bundles is known by what is in it.
    save_bundle(load_bundle(tmp_path / "bundle"), tmp_path / "family" / "window-3")
    assert find_method_name(of_bundle("family", str(tmp_path / "family"))) == "settle"
    assert is_available(of_bundle("family", str(tmp_path / "family")), 3)
    save_bundle(SettleBundle.of(model, {}), tmp_path / "runs")
    with pytest.raises(CheckpointError, match="was taught on runs, and here forgettings"):
        is_available(of_bundle("runs", str(tmp_path / "runs")), 3)


def find_method_name(variant: Variant) -> str:
    return method_of(variant).name


def test_an_untaught_one_predicts_the_average(networks: list[NetworkRun]) -> None:
    for run in networks:
        window = run.window(3, 1, 0)
        assert window.states[-1] is run.states[-1]
        weights, _ = settled(Settle(3), window)
        for name, tensor in weights.items():
            mean = sum(state[name].double() for state in window.states) / 3
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)


def test_what_is_taught_reads_forgettings_and_says_so(
    networks: list[NetworkRun], tmp_path: Path
) -> None:
    split = split_runs(networks, 0.5, 3)
    bundle = teach_bundle(split, SETTINGS, {})
    assert bundle.trajectory is TrajectoryKind.FORGETTING
    save_bundle(bundle, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.trajectory is TrajectoryKind.FORGETTING
    (gains,) = loaded.manifest["gains"].values()
    assert next(iter(gains["accuracy"])) == "naive"
    assert gains["accuracy"]["naive"] == [0.0, 0.0] or gains["runs"] == 1
    names = {"last", "average-forgotten-2", "average-2", "average-3", "settle"}
    assert names <= set(gains["accuracy"])
    assert "annealed-20" not in gains["accuracy"]
    page = network_markdown({**loaded.to_json(), "processor_seconds": 1})
    assert page.startswith("# The hyper-model for forgettings, taught through the networks\n")
    assert "cross entropy over Θ0, on samples that the forgettings have not seen" in page
    assert "points over naive" in page
    # As a start of an evaluation it is an average of all, normalisation layers with it.
    variant = of_bundle("taught", str(tmp_path / "bundle"))
    assert method_of(variant).name == "settle"
    assert method_of(variant).norm is NormMode.AVERAGE
    assert not variant.steps
    assert is_available(variant, 3)
    assert not is_available(variant, 5)
    assert method_of(of_bundle("other", str(tmp_path / "nothing"))).name == "known"


def test_the_most_forgotten_checkpoints_are_compared_with(networks: list[NetworkRun]) -> None:
    assert forgotten(3) == {"last": [1, 0, 0], "average-forgotten-2": [0.5, 0.5, 0]}
    assert forgotten(5)["average-forgotten-3"] == pytest.approx([1 / 3] * 3 + [0] * 2)
    (found,) = HeldOut(networks[:1], 3).measured(SettleModel(Settle(3)))
    run = networks[0]
    window = run.window(3, 1, 0)
    by_hand = {
        "naive": run.states[-1],
        "last": window.states[0],
        "average-forgotten-2": combine(window.states, [0.5, 0.5, 0.0]),
    }
    for name, state in by_hand.items():
        assert found["measured"][name].loss == pytest.approx(measure(run, state).loss, rel=1e-5)
    assert next(iter(found["measured"])) == "naive"


def test_a_bundle_for_the_other_kind_is_refused(
    know: Command, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    save_bundle(SettleBundle.of(Settle(3), {}), tmp_path / "runs")
    save_bundle(SettleBundle.of(Settle(3), {}, TrajectoryKind.FORGETTING), tmp_path / "forgettings")
    names = [recorded[1] / "00000" / f"ckpt{k}.safetensors" for k in range(3)]
    output = tmp_path / "out.safetensors"
    found = know(
        "predict", *names, "-o", output, "--method", "settle", "--weights", tmp_path / "runs"
    )
    assert found.returncode == 3
    words = "this hyper-model was taught on runs, and these checkpoints are of a forgetting"
    assert words in one_line(found.stderr)
    # A bundle says what reads it.
    found = know("predict", *names, "-o", output, "--weights", tmp_path / "forgettings")
    assert found.returncode == 0, found.stderr
    digest = load_bundle(tmp_path / "forgettings").digest[:8]
    assert f"from 3 checkpoints at rate 0.8, settle {digest}" in found.stdout
    states = [read_state(name) for name in names]
    for name, tensor in read_state(output).items():
        if tensor.is_floating_point() and "running" not in name:
            mean = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    network = ("train", recorded[0], "--objective", "network", "--evaluate")
    found = know(*network, tmp_path / "runs")
    assert found.returncode == 2
    assert "was taught on runs, and 00000-" in one_line(found.stderr)


def test_the_command_teaches_on_forgettings(
    know: Command, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["train", recorded[0], "-o", tmp_path / "bundle", "--objective", "network"]
    settings = ["--checkpoints", 3, "--meta-steps", 2, "--runs-per-step", 2, "--holdout", 0.5]
    done = know(*arguments, *settings, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert "forgetting to learn from" in done.stderr
    assert "points over naive" in done.stderr
    assert "Accuracy and cross entropy over Θ0" in " ".join(done.stdout.split())
    assert load_bundle(tmp_path / "bundle").trajectory is TrajectoryKind.FORGETTING
    found = know(*arguments, "--checkpoints", 5, "--force")
    assert found.returncode == 2
    assert "none of 4 can be taught with: " in one_line(found.stderr)
    assert "00000.safetensors: fewer than 5 sessions" in found.stderr
    # Sessions that the windows need all, and no record of training on more data.
    settings[1] = 4
    found = know(*arguments, *settings, "--distance", 0.5, "--force")
    assert found.returncode == 2
    words = "--distance: all windows of 4 checkpoints end at Θ0, and none of the forgettings has it"
    assert words in one_line(found.stderr)
    assert "collect with --regime chain, which records that" in one_line(found.stderr)


def test_what_cannot_be_taught_on_is_said(
    networks: list[NetworkRun], recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    found, left_out = load_networks([recorded[0]], 5, None)
    assert (found, set(left_out.values())) == ([], {"fewer than 5 sessions"})
    for name in ("part", "all", "none", "twice"):
        (tmp_path / name).mkdir()
    series = record_trajectory(
        brief_setup("mlp", 50), load(_DATA), recorded[1] / "00000", rows_per_tensor=5
    )
    save_series(series, tmp_path / "part" / "00000.safetensors")
    found, left_out = load_networks([tmp_path / "part"], 3, None)
    assert not found
    (reason,) = left_out.values()
    assert "only a part of tensor 'fc1.weight' is kept; --rows-per-tensor can keep" in reason
    everything = replace(brief_setup("mlp", 50), samples=640)
    series = replace(series, facts={**series.facts, "setup": everything.to_json()})
    save_series(series, tmp_path / "all" / "00000.safetensors")
    (reason,) = load_networks([tmp_path / "all"], 3, None)[1].values()
    assert "fewer than 200 samples that it has not seen (--samples leaves some)" in reason
    whole = load_series(recorded[0] / "00000.safetensors")
    save_series(whole, tmp_path / "twice" / "00000.safetensors")
    facts = {name: value for name, value in series.facts.items() if name != "setup"}
    save_series(replace(series, facts=facts), tmp_path / "none" / "00000.safetensors")
    with pytest.raises(CheckpointError, match="does not say how its networks were made"):
        load_networks([tmp_path / "none"], 3, None)
    with pytest.raises(UsageError, match="00000-.* is there more than once; give different"):
        load_networks([recorded[0], tmp_path / "twice"], 3, None)
    with pytest.raises(UsageError, match="nothing says how its networks were made; take what"):
        load_networks([recorded[1] / "00000"], 3, None)
    (tmp_path / "runs" / "00000").mkdir(parents=True)
    (tmp_path / "runs" / "00000" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"runs holds runs and .*files.* does not"):
        load_networks([recorded[0], tmp_path / "runs"], 3, None)
